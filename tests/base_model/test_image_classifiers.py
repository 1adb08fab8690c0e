"""Image classifiers: gradients of mixed batches against autograd through transformers' own models."""

from __future__ import annotations

import asyncio
import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file

from cola_runtime.adapter_spec import AdapterPart, AdapterSpec, HeadKind, LoraKind, head_part
from cola_runtime.adapters.dropout import SegmentDropout
from cola_runtime.base_model.images import ImageInput
from cola_runtime.base_model.model import TappedModel
from cola_runtime.base_model.service import BaseModelService
from cola_runtime.encodings import Encoding
from cola_runtime.errors import InvalidInput
from cola_runtime.image_processing import PROCESSOR_FILE
from cola_runtime.job_choices import Task
from cola_runtime.rows import EncodedImage, Row
from cola_runtime.testing.architectures import IMAGES, WITHOUT_ATTENTION, save_image_classifier
from cola_runtime.testing.ordinary_modules import OrdinaryAdapter
from cola_runtime.testing.peft_reference import relative_difference
from cola_runtime.testing.sequence_reference import sequence_model, sequence_output
from cola_runtime.types import BaseStep, Site
from tests.base_model.image_samples import image_row
from tests.base_model.kind_samples import BOUNDS, KINDS, NONLINEAR, ZERO, fitting, random_weights
from tests.base_model.mixed_samples import (
    Tenant,
    Weights,
    gradients_of,
    install_all,
    poisoned,
    run_segments,
)


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


def load(path: Path, model_type: str) -> TappedModel:
    """Eager attention goes through float32, whatever the model's type."""
    attention = "auto" if model_type in WITHOUT_ATTENTION else "sdpa"
    return TappedModel.load(path, dtype="float64", attention=attention)


@pytest.mark.parametrize(
    ("model_type", "encoding"),
    [
        *((model_type, Encoding.ADAPTER_GRADIENT) for model_type in IMAGES),
        ("convnext", Encoding.ACTIVATIONS),
        ("convnext", Encoding.WEIGHT_GRADIENT),
    ],
)
def test_tenants_of_several_kinds_in_one_batch_are_autograds(
    model_type: str, encoding: Encoding, tmp_path: Path
) -> None:
    path = save_image_classifier(model_type, tmp_path, dtype="float64")
    tapped = load(path, model_type)
    kinds = ["lora", "mlp-gelu"]
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
    tapped = load(save_image_classifier("vit", tmp_path, dtype="float64"), "vit")
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
    tapped = load(path, "vit")
    members = [poisoned(member(tapped, "lora")), member(tapped, "rslora")]
    install_all(tapped, members)
    result, taps = run_segments(tapped, [each.segment() for each in members])
    assert np.isnan(result.losses[0].loss_sum)
    assert_stock(path, tapped, members[1], gradients_of(taps, 1, members[1]))


def encoded(row: Row) -> Row:
    content = io.BytesIO()
    Pillow.fromarray(row.image.pixels.transpose(1, 2, 0)).save(content, "PNG")
    return replace(row, image=EncodedImage(content=content.getvalue(), tokens=row.image.tokens))


async def test_the_service_decodes_images_and_computes_steps_in_the_order_they_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tapped = load(save_image_classifier("vit", tmp_path, dtype="float64"), "vit")
    each = member(tapped, "lora")
    install_all(tapped, [each])
    expected, _ = run_segments(tapped, [each.segment()], train=False)
    cut = replace(encoded(each.rows[0]), image=EncodedImage(content=b"no image", tokens=17))
    decoded = ImageInput.decoded

    def slow_for_the_first(images: ImageInput, step: BaseStep) -> BaseStep:
        time.sleep(0.2 if step.number == 1 else 0.0)
        return decoded(images, step)

    monkeypatch.setattr(ImageInput, "decoded", slow_for_the_first)
    service = BaseModelService(tapped, name="tiny", join_token="secret")
    steps = [
        BaseStep(number=number, segments=(replace(each.segment(), rows=rows),), train=False)
        for number, rows in ((1, tuple(map(encoded, each.rows))), (2, (cut,)))
    ]
    try:
        results = await asyncio.gather(*map(service.run, steps))
    finally:
        await service.stop()
    assert [result.number for result in results] == [1, 2]
    assert results[0].started < results[1].started
    assert results[0].losses[0].loss_sum == expected.losses[0].loss_sum
    assert results[1].losses[0].reason == "ROW_INVALID"


def test_dropout_masks_as_many_positions_as_an_image_has_at_each_site(tmp_path: Path) -> None:
    path = save_image_classifier("convnext", tmp_path, dtype="float64")
    tapped = load(path, "convnext")
    each = member(tapped, "rslora")
    kind = LoraKind(rank=4, alpha=3.0, use_rslora=True, dropout=0.4)
    head = each.spec.parts[1]
    body = AdapterPart(kind=kind, sites=tapped.sites)
    spec = AdapterSpec(parts=(body, head), seed=each.spec.seed, dtype="float64")
    each = replace(each, spec=spec, weights=random_weights(spec))
    install_all(tapped, [each])
    _, taps = run_segments(tapped, [each.segment()])

    alone = AdapterSpec(parts=(head,), seed=spec.seed, dtype="float64")
    model, parameters = sequence_model(path, alone, each.weights, dtype="float64", attention="eager")
    draw = SegmentDropout(
        dropout=0.4,
        seed=spec.seed,
        version=0,
        rows=tuple(range(len(each.rows))),
        lengths=(None,) * len(each.rows),
    )
    for site in body.sites:
        adapter = OrdinaryAdapter(kind, site, each.weights)

        def add(
            _module: Any, args: Any, output: torch.Tensor, adapter: Any = adapter, site: Site = site
        ) -> Any:
            mask = draw.mask(site, args[0].numel() // site.in_features // len(each.rows))
            return output + adapter(args[0] * mask.view(args[0].shape) / 0.6)

        model.get_submodule(site.name).register_forward_hook(add)
        parameters.update(adapter.named)
    sequence_output(model, each.rows).loss.backward()
    expected = {key.gradient: parameter.grad for key, parameter in parameters.items()}
    assert max(relative_difference(gradients_of(taps, 0, each), expected).values()) < BOUNDS["float64"]


def test_a_folder_without_whole_weights_or_with_images_of_another_size_is_refused(tmp_path: Path) -> None:
    path = save_image_classifier("vit", tmp_path, dtype="float32")
    processor = json.loads((path / PROCESSOR_FILE).read_text())
    (path / PROCESSOR_FILE).write_text(json.dumps({**processor, "size": {"height": 16, "width": 32}}))
    with pytest.raises(InvalidInput, match=r"16\*32") as caught:
        load(path, "vit")
    assert caught.value.reason == "BASE_MODEL_UNSUPPORTED"
    (path / PROCESSOR_FILE).write_text(
        json.dumps({**processor, "image_processor_type": "CLIPImageProcessor"})
    )
    with pytest.raises(InvalidInput) as caught:
        load(path, "vit")
    assert caught.value.reason == "IMAGE_PROCESSOR_UNSUPPORTED"
    tensors = load_file(path / "model.safetensors")
    tensors.pop("vit.layernorm.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match=r"vit\.layernorm\.weight"):
        load(path, "vit")
