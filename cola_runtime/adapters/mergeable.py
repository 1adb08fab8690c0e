"""Which adapters may be merged into base weights. Torch-free: admission and the base model ask the same."""

from __future__ import annotations

from collections.abc import Collection

from cola_runtime.adapter_spec import (
    AdapterSpec,
    HeadKind,
    LinearizedLoraKind,
    LinearKind,
    LoraKind,
    input_dropout,
)
from cola_runtime.errors import InvalidInput
from cola_runtime.types import UNQUANTIZED

LINEAR_KINDS = (LoraKind, LinearizedLoraKind, LinearKind)
"""s * a(x) = delta x + b: the merged base weight gives the same function."""
WIDE_DTYPES = ("float32", "float64")


def check_mergeable(
    spec: AdapterSpec, *, dtype: str, tied_sites: Collection[int], quantization: str = UNQUANTIZED
) -> None:
    """Raises InvalidInput for an adapter that W0 + delta, in the base model's `dtype`, would not be.

    `MERGED_NEEDS_LINEAR`: a kind that is not linear in x. `MERGED_DROPOUT`: dropout inside the adapter.
    `MERGED_QUANTIZED`: base weights of 8 or 4 bits. `MERGED_DTYPE`: a base model in half precision.
    `MERGED_TIED_WEIGHT`: a site whose weight is another module's too. `MERGED_GROUPED_LORA`: a LoRA at a
    convolution in groups.
    """
    if quantization != UNQUANTIZED:
        raise InvalidInput(
            "MERGED_QUANTIZED",
            f"the base weights are held as {quantization}, in which a merged delta would be rounded away",
            where="job.mode",
            limit=UNQUANTIZED,
            actual=quantization,
            remedy="Train with mode unmerged, or serve the base model in float32.",
        )
    _check_dtype(dtype)
    for part in spec.parts:
        if not isinstance(part.kind, (*LINEAR_KINDS, HeadKind)):
            raise InvalidInput(
                "MERGED_NEEDS_LINEAR",
                f"an adapter of kind {part.kind.kind} is no matrix that could be added to a base weight",
                where="job.adapter",
                limit=", ".join(kind.model_fields["kind"].default for kind in LINEAR_KINDS),
                actual=part.kind.kind,
                remedy="Train it with mode unmerged, or take a kind that is linear in x.",
            )
        if input_dropout(part.kind):
            raise InvalidInput(
                "MERGED_DROPOUT",
                "a merged adapter is part of the base weights: there is no input of its own to drop",
                where="job.adapter.dropout",
                remedy="Use dropout 0, or mode unmerged.",
            )
    for site in spec.sites:
        if site.groups > 1 and isinstance(spec.kinds[site.index], LoraKind):
            raise InvalidInput(
                "MERGED_GROUPED_LORA",
                f"peft's LoRA at {site.name} mixes the channels of its {site.groups} groups, which no weight "
                "of that convolution does",
                where="job.adapter.target_modules",
                remedy="Use kind linear there, leave the module out, or train with mode unmerged.",
            )
        if site.index in tied_sites:
            raise InvalidInput(
                "MERGED_TIED_WEIGHT",
                f"the weight of {site.name} is shared with another module, which merging would change too",
                where="job.adapter.target_modules",
                remedy="Leave the module out, or train with mode unmerged.",
            )


def _check_dtype(dtype: str) -> None:
    if dtype not in WIDE_DTYPES:
        raise InvalidInput(
            "MERGED_DTYPE",
            f"the base model is in {dtype}, which would round most of a merged delta away: of one that is "
            "5e-4 of the weight, bfloat16 loses 90 %",
            where="job.mode",
            limit=" or ".join(WIDE_DTYPES),
            actual=dtype,
            remedy="Train with mode unmerged, or serve the base model in float32.",
        )
