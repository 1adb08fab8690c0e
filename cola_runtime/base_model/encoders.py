"""Opens bidirectional encoders (BERT's and RoBERTa's families) and finds where they pool a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cola_runtime.base_model.heads import Pooling
from cola_runtime.base_model.stock import check_complete, open_classifier

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

    model, missing = open_classifier(AutoModelForSequenceClassification, path, dtype, attention)
    model.classifier = torch.nn.Identity()
    if any(".pooler." in name for name in missing):
        model.base_model.pooler = None
    check_complete(model, {name for name in missing if ".pooler." not in name})
    return model, Pooling(first_token=True, module=getattr(model.base_model, "pooler", None))
