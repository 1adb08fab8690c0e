"""Where the base model computes: chosen, described, refused where it is missing; and what it says there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cola_runtime.base_model.accelerator import Accelerator
from cola_runtime.base_model.model import TappedModel
from cola_runtime.errors import InvalidInput
from tests.base_model.conftest import TinyFolder
from tests.base_model.mixed_samples import four_tenants, install_all, run_segments

PROMPTS = [[40, 41, 42, 90, 91], [7, 8, 9]]


def test_cuda_is_refused_before_anything_is_read_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidInput) as caught:
        TappedModel.load(Path("/no/such/folder"), dtype="float32", accelerator="cuda")
    assert caught.value.reason == "ACCELERATOR_MISSING"
    assert Accelerator.of("auto").description == "cpu"


def test_the_description_names_the_accelerator(tiny_folder: TinyFolder, accelerator: str) -> None:
    model = TappedModel.load(tiny_folder("llama", "float32"), dtype="float32", accelerator=accelerator)
    assert model.describe("", "").details["accelerator"].startswith(accelerator)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_generates_what_the_processor_generates(
    tiny_folder: TinyFolder, accelerator: str, kind: str
) -> None:
    path = tiny_folder(kind, "float64")
    texts = []
    for where in ("cpu", accelerator):
        model = TappedModel.load(path, dtype="float64", accelerator=where)
        member = four_tenants(model.sites, "float64")[0]
        install_all(model, [member])
        texts.append(model.generate(member.job_id, PROMPTS, max_new_tokens=12))
        sampled = [model.generate(None, PROMPTS, max_new_tokens=9, temperature=0.8, seed=5) for _ in range(2)]
        assert sampled[0] == sampled[1]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantized_base_trains_where_it_is_placed(
    tiny_folder: TinyFolder, accelerator: str, quantization: str, require_package: Callable[[str], None]
) -> None:
    """To the digits that a weight of 8 or 4 bits leaves: the loss is near the whole weights' loss."""
    require_package("bitsandbytes")
    losses = {}
    for held in ("none", quantization):
        model = TappedModel.load(
            tiny_folder("llama", "float32"), dtype="float32", quantization=held, accelerator=accelerator
        )
        tenants = four_tenants(model.sites, "float32")
        install_all(model, tenants)
        result, taps = run_segments(model, [member.segment() for member in tenants])
        losses[held] = sum(loss.loss_sum for loss in result.losses)
        assert all(bool(t.isfinite().all()) for tap in taps for t in tap.tensors.values())
    assert losses[quantization] != losses["none"]
    assert losses[quantization] == pytest.approx(losses["none"], rel=0.1)
