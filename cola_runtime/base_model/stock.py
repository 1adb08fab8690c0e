"""Opens a pretrained folder with one of transformers' own classes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
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
    return _read(auto_class, path, dtype, attention)[0]


def open_classifier(
    auto_class: Any, path: Path, dtype: torch.dtype, attention: str | None
) -> tuple[Any, set[str]]:
    """As `open_frozen`, with a classifier that may be new; and what else the folder has no weights for."""
    with _quiet_loading():
        model, info = _read(auto_class, path, dtype, attention)
    return model, {name for name in info["missing_keys"] if not name.startswith("classifier.")}


def _read(
    auto_class: Any, path: Path, dtype: torch.dtype, attention: str | None
) -> tuple[Any, dict[str, Any]]:
    try:
        model, info = auto_class.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except ValueError as error:
        raise InvalidInput(
            "BASE_MODEL_UNSUPPORTED",
            str(error),
            where="base_model",
            remedy="Set base_model.attention to auto, or serve another base model.",
        ) from error
    _check_one_dtype(model, dtype)
    return model.eval().requires_grad_(False), info


def check_complete(model: Any, missing: Collection[str]) -> None:
    """Raises InvalidInput `BASE_MODEL_UNSUPPORTED` where weights are missing."""
    if missing:
        raise InvalidInput(
            "BASE_MODEL_UNSUPPORTED",
            f"{type(model).__name__} lacks the weights {', '.join(sorted(missing)[:4])}",
            where="base_model",
            remedy="Use a folder with all of the encoder's weights.",
        )


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """transformers warns that the classifier, which is thrown away, is new."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_one_dtype(model: Any, dtype: torch.dtype) -> None:
    """T5's family keeps weights in float32 beside float16, and clamps a whole batch by its largest value."""
    other = next((name for name, parameter in model.named_parameters() if parameter.dtype != dtype), None)
    if other is not None:
        raise InvalidInput(
            "BASE_MODEL_UNSUPPORTED",
            f"{type(model).__name__} keeps {other} in another dtype than {dtype}",
            where="base_models.dtype",
            remedy="Serve it in float32 or bfloat16.",
        )
