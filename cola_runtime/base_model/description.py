"""What the coordinator and its users are told of a base model."""

from __future__ import annotations

from typing import Any

from cola_runtime.base_model.load import LoadedModel
from cola_runtime.types import PRODUCT_FLOPS, QUANTIZATION, BaseModelDescription


def described(
    loaded: LoadedModel, *, name: str, gradient_endpoint: str, body: str, unpadded: bool, threads: int
) -> BaseModelDescription:
    """`body` names what computes its training steps."""
    return BaseModelDescription(
        name=name,
        architecture=type(loaded.model).__name__,
        context_length=loaded.context_length,
        vocabulary_size=loaded.vocabulary_size,
        dtype=loaded.dtype,
        sites=loaded.sites,
        gradient_endpoint=gradient_endpoint,
        tokenizer_path=str(loaded.path),
        parameters=loaded.parameters,
        hidden_size=loaded.hidden_size,
        tasks=loaded.tasks,
        details={
            "tasks": ", ".join(loaded.tasks),
            "attention": _attention(loaded),
            "body": body,
            "activation_checkpointing": "on" if loaded.activation_checkpointing else "off",
            "threads": str(threads),
            "accelerator": loaded.accelerator.description,
            QUANTIZATION: loaded.quantization,
            "weight_bytes": str(_weight_bytes(loaded.model)),
            PRODUCT_FLOPS: repr(loaded.product_flops),
        },
        unpadded=unpadded,
        tied_sites=loaded.tied_sites,
        source_groups=tuple(sorted(loaded.source_groups)),
    )


def _attention(loaded: LoadedModel) -> str:
    return f"fused, {loaded.attention} when generating" if loaded.by_hand else loaded.attention


def _weight_bytes(model: Any) -> int:
    """Of the frozen weights, those that several modules share once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
