"""Opens bidirectional encoders (BERT's and RoBERTa's families) and finds where they pool a row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cola_runtime.base_model.heads import Pooling
from cola_runtime.errors import InvalidInput

# Their own classification models take the first token: BERT's through its pooler, RoBERTa's as it is.
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert")


def is_encoder(path: Path) -> bool:
    """The folder's config.json describes one of ENCODERS that attends in both directions."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    return config.model_type in ENCODERS and not config.is_decoder


def read_encoder(path: Path, dtype: torch.dtype, attention: str | None) -> tuple[Any, Pooling]:
    """The frozen encoder as its architecture's classification model, without that model's own classifier.

    So modules have the names that PEFT gives them there. A BERT checkpoint without pooler pools the bare
    first token. Raises InvalidInput `BASE_MODEL_UNSUPPORTED` where other weights are missing.
    """
    from transformers import AutoModelForSequenceClassification

    with _quiet_loading():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    model.classifier = torch.nn.Identity()
    missing = {name for name in info["missing_keys"] if not name.startswith("classifier.")}
    if any(".pooler." in name for name in missing):
        model.base_model.pooler = None
    _check_complete(model, {name for name in missing if ".pooler." not in name})
    model.eval().requires_grad_(False)
    return model, Pooling(first_token=True, module=getattr(model.base_model, "pooler", None))


def _check_complete(model: Any, missing: set[str]) -> None:
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
