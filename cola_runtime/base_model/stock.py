"""Opens a pretrained folder with one of transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cola_runtime.errors import InvalidInput


def open_frozen(auto_class: Any, path: Path, dtype: torch.dtype, attention: str | None) -> Any:
    """The frozen model in evaluation mode, from safetensors on this machine only.

    `attention` None is transformers' own choice: some architectures have one only. Raises InvalidInput
    `BASE_MODEL_UNSUPPORTED` for an architecture without that attention, that the class does not open, or
    that does not compute in `dtype` throughout.
    """
    try:
        model = auto_class.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, use_safetensors=True, local_files_only=True
        )
    except ValueError as error:
        raise InvalidInput(
            "BASE_MODEL_UNSUPPORTED",
            str(error),
            where="base_model",
            remedy="Set base_model.attention to auto, or serve another base model.",
        ) from error
    _check_one_dtype(model, dtype)
    return model.eval().requires_grad_(False)


def _check_one_dtype(model: Any, dtype: torch.dtype) -> None:
    """T5's family keeps weights in float32 beside float16, and clamps a whole batch by its largest value."""
    other = next((name for name, parameter in model.named_parameters() if parameter.dtype != dtype), None)
    if other is not None:
        raise InvalidInput(
            "BASE_MODEL_UNSUPPORTED",
            f"{type(model).__name__} keeps {other} in another dtype than {dtype}",
            where="base_model.dtype",
            remedy="Serve it in float32 or bfloat16.",
        )
