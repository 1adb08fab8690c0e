"""Transformers' own classification model, of texts or images, with one tenant's adapter and head as modules.

What classification and regression in mixed batches are compared with: the model pools and computes its loss
itself, autograd differentiates it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cola_runtime.adapter_spec import AdapterSpec
from cola_runtime.adapters.schedule import learning_rate
from cola_runtime.image_processing import PROCESSOR_FILE
from cola_runtime.rows import EncodedImage, Row
from cola_runtime.testing.ordinary_modules import add_adapter, wide_norms
from cola_runtime.testing.peft_reference import Recipe, TrainedAlone, descend, torch_optimizer
from cola_runtime.types import TensorKey, TensorKind

_FIRST = "channels_first"


class _FirstToken(nn.Module):
    """RoBERTa's place of classification without its own dense layers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.linear(hidden[:, 0])
        return logits


def sequence_model(
    path: Path, spec: AdapterSpec, weights: Mapping[TensorKey, Tensor], *, dtype: str, attention: str = "sdpa"
) -> tuple[Any, dict[TensorKey, Tensor]]:
    """The frozen model in evaluation mode with the adapter and the head; their parameters, by our names."""
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    of_images = (path / PROCESSOR_FILE).is_file()
    auto_class = AutoModelForImageClassification if of_images else AutoModelForSequenceClassification
    assert spec.head is not None
    kind, site = spec.head
    model = auto_class.from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        num_labels=kind.labels,
        ignore_mismatched_sizes=True,  # of the classifier, which the head replaces
        problem_type="regression" if kind.problem == "regression" else "single_label_classification",
    )
    model.requires_grad_(False).eval()
    wide_norms(model)
    parameters = add_adapter(model, spec, weights)
    head = nn.Linear(site.in_features, kind.labels, dtype=getattr(torch, spec.dtype))
    for tensor, parameter in ((TensorKind.WEIGHT, head.weight), (TensorKind.BIAS, head.bias)):
        parameter.data.copy_(weights[TensorKey(site.index, tensor)])
        parameters[TensorKey(site.index, tensor)] = parameter
    if hasattr(model, "score"):
        model.score = head
    elif isinstance(model.classifier, nn.Sequential):
        model.classifier[-1] = head
    else:
        model.classifier = head if isinstance(model.classifier, nn.Linear) else _FirstToken(head)
    return model, parameters


def sequence_output(model: Any, rows: Sequence[Row]) -> Any:
    """The model's own output, with its own mean loss, for images or right-padded tokens."""
    regression = model.config.problem_type == "regression"
    labels = torch.tensor([row.label for row in rows], dtype=model.dtype if regression else torch.int64)
    of_images = rows[0].image is not None
    return model(**(_pixels(model, rows) if of_images else _tokens(model, rows)), labels=labels)


def _pixels(model: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
    """By transformers' own image processor, from the encoded image where the row has it."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(model.name_or_path)
    images = [
        processor(_loaded(row.image.content))
        if isinstance(row.image, EncodedImage)
        else processor(row.image.pixels, do_resize=False, do_center_crop=False, input_data_format=_FIRST)
        for row in rows
        if row.image is not None
    ]
    pixels = np.concatenate([np.stack(image["pixel_values"]) for image in images])
    return {"pixel_values": torch.from_numpy(pixels).to(model.dtype)}


def _loaded(content: bytes) -> Any:
    from transformers.image_utils import load_image

    return load_image(Pillow.open(io.BytesIO(content)))


def _tokens(model: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
    tokens = [torch.from_numpy(row.tokens).long() for row in rows]
    inputs = {
        "input_ids": pad_sequence(tokens, batch_first=True, padding_value=model.config.pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(each) for each in tokens], batch_first=True),
    }
    if getattr(model.config, "type_vocab_size", 0) > 1:
        types = [torch.zeros(len(row.tokens)) if row.token_types is None else row.token_types for row in rows]
        inputs["token_type_ids"] = pad_sequence(
            [torch.as_tensor(each).long() for each in types], batch_first=True
        )
    return inputs


def train_sequence_alone(path: Path, recipe: Recipe, *, dtype: str, attention: str = "sdpa") -> TrainedAlone:
    """`train_alone` for a task with a head: adapter and head together, by torch.optim."""
    model, parameters = sequence_model(
        path, recipe.spec, recipe.initial_weights, dtype=dtype, attention=attention
    )
    optimizer = torch_optimizer(recipe.optimizer, list(parameters.values()))
    losses = []
    for step, rows in enumerate(recipe.steps):
        loss = sequence_output(model, rows).loss
        descend(loss, optimizer, recipe, learning_rate(recipe.schedule, recipe.optimizer.learning_rate, step))
        losses.append(loss.item())
    return TrainedAlone(weights={key: p.detach().clone() for key, p in parameters.items()}, losses=losses)
