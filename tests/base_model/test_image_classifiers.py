"""Image classifiers: gradients of mixed batches against autograd through transformers' own models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cola_runtime.adapter_spec import AdapterPart, AdapterSpec, HeadKind, head_part
from cola_runtime.base_model.model import TappedModel
from cola_runtime.testing.architectures import IMAGES, save_image_classifier
from cola_runtime.testing.peft_reference import relative_difference
from cola_runtime.testing.sequence_reference import sequence_model, sequence_output
from cola_runtime.types import Encoding, Image, Row, Task
from tests.base_model.kind_samples import BOUNDS, KINDS, NONLINEAR, ZERO, fitting, random_weights
from tests.base_model.mixed_samples import (
    Tenant,
    Weights,
    gradients_of,
    install_all,
    poisoned,
    run_segments,
)

NO_TOKENS, NO_WEIGHTS = np.empty(0, np.int32), np.empty(0, np.float32)


def image_row(tapped: TappedModel, *, seed: int, labels: int) -> Row:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (3, 32, 32), dtype=np.uint8)
    image = Image(pixels=pixels, tokens=tapped.describe("", "").context_length)
    return Row(tokens=NO_TOKENS, weights=NO_WEIGHTS, label=int(random.integers(0, labels)), image=image)


def member(tapped: TappedModel, kind: str, *, body: bool = True) -> Tenant:
    """A tenant of the kind at every site, with another number of labels than the others."""
    number = list(KINDS).index(kind)
    parts = []
    if body:
        parts.append(AdapterPart(kind=KINDS[kind], sites=fitting(KINDS[kind], tapped.catalogue)))
    head = HeadKind(labels=2 + number)
    parts.append(head_part(head, tapped.catalogue, hidden_size=tapped.describe("", "").hidden_size))
    spec = AdapterSpec(parts=tuple(parts), seed=number, dtype="float64")
    rows = [image_row(tapped, seed=10 * number + place, labels=2 + number) for place in range(1 + number % 3)]
    return Tenant(job_id=f"job-{number}", spec=spec, weights=random_weights(spec), rows=tuple(rows))


def stock_gradients(path: Path, tapped: TappedModel, each: Tenant) -> tuple[Weights, float]:
    """By autograd through transformers' own classification model and loss; and the mean loss."""
    attention = tapped.describe("", "").details["attention"]
    model, parameters = sequence_model(path, each.spec, each.weights, dtype="float64", attention=attention)
    loss = sequence_output(model, each.rows).loss
    loss.backward()
    return {
        key.gradient: torch.zeros_like(p) if p.grad is None else p.grad for key, p in parameters.items()
    }, float(loss.detach())


def assert_stock(path: Path, tapped: TappedModel, each: Tenant, gradients: Weights) -> float:
    """Returns the stock model's mean loss."""
    expected, mean = stock_gradients(path, tapped, each)
    floor = ZERO * max(float(gradient.norm()) for gradient in expected.values())
    differences = relative_difference(gradients, expected)
    differences = {key: d for key, d in differences.items() if float(expected[key].norm()) > floor}
    worst = max(differences, key=lambda key: differences[key])
    assert differences[worst] < BOUNDS["float64"], (each.spec.parts[0].kind, worst, differences[worst])
    return mean


@pytest.mark.parametrize(
    ("model_type", "encoding"),
    [
        *((model_type, Encoding.ADAPTER_GRADIENT) for model_type in IMAGES),
        ("vit", Encoding.ACTIVATIONS),
        ("convnext", Encoding.ACTIVATIONS),
        ("vit", Encoding.WEIGHT_GRADIENT),
    ],
)
def test_tenants_of_all_kinds_in_one_batch_are_autograds(
    model_type: str, encoding: Encoding, tmp_path: Path
) -> None:
    path = save_image_classifier(model_type, tmp_path, dtype="float64")
    tapped = TappedModel.load(path, dtype="float64")
    kinds = list(KINDS) if model_type == "vit" else ["lora", "linear-bias", "mlp-gelu"]
    tenants = [member(tapped, kind) for kind in kinds]
    install_all(tapped, tenants)
    result, taps = run_segments(
        tapped,
        [
            each.segment(Encoding.ACTIVATIONS if kind in NONLINEAR else encoding)
            for kind, each in zip(kinds, tenants, strict=True)
        ],
    )
    assert [loss.reason for loss in result.losses] == [None] * len(tenants)
    assert result.computed_tokens == result.real_tokens == sum(each.segment().tokens for each in tenants)
    for position, each in enumerate(tenants):
        mean = assert_stock(path, tapped, each, gradients_of(taps, position, each))
        loss = result.losses[position]
        assert loss.loss_sum / loss.weight_sum == pytest.approx(mean, rel=1e-10)


def test_it_says_what_it_serves_and_refuses_rows_of_anything_else(tmp_path: Path) -> None:
    tapped = TappedModel.load(save_image_classifier("vit", tmp_path, dtype="float64"), dtype="float64")
    description = tapped.describe("", "")
    assert description.tasks == (Task.IMAGE_CLASSIFICATION,)
    assert description.context_length == 17  # 16 patches and the class token
    good = member(tapped, "lora")
    install_all(tapped, [good])
    row = good.rows[0]
    wrong = [
        replace(row, image=replace(row.image, pixels=row.image.pixels[:, :, :24])),
        replace(row, image=replace(row.image, pixels=row.image.pixels.astype(np.float32))),
        replace(row, image=replace(row.image, tokens=1)),
        replace(row, image=None, tokens=np.ones(4, np.int32)),
        replace(row, label=2),
    ]
    for each in wrong:
        result, _ = run_segments(tapped, [replace(good.segment(), rows=(each,))])
        assert [loss.reason for loss in result.losses] == ["ROW_INVALID"]


def test_a_neighbours_nan_adapter_reaches_nobody(tmp_path: Path) -> None:
    path = save_image_classifier("vit", tmp_path, dtype="float64")
    tapped = TappedModel.load(path, dtype="float64")
    members = [poisoned(member(tapped, "lora")), member(tapped, "rslora")]
    install_all(tapped, members)
    result, taps = run_segments(tapped, [each.segment() for each in members])
    assert np.isnan(result.losses[0].loss_sum)
    assert_stock(path, tapped, members[1], gradients_of(taps, 1, members[1]))
