"""No tenant's weights, rows or staleness reach its neighbours in a mixed batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cola_runtime.base_model.model import TappedModel
from cola_runtime.encodings import Encoding
from cola_runtime.rows import Row
from cola_runtime.types import SegmentLoss
from tests.base_model.conftest import TinyFolder
from tests.base_model.mixed_samples import (
    Tenant,
    Weights,
    four_tenants,
    gradients_of,
    install_all,
    poisoned,
    run_segments,
)


def outcomes(
    model: TappedModel, tenants: list[Tenant], encoding: Encoding
) -> list[tuple[SegmentLoss, Weights]]:
    result, taps = run_segments(model, [member.segment(encoding) for member in tenants])
    return [
        (result.losses[position], gradients_of(taps, position, member))
        for position, member in enumerate(tenants)
    ]


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_nan_adapter_leaves_its_neighbours_bit_identical(
    tiny_folder: TinyFolder, kind: str, encoding: Encoding
) -> None:
    model = TappedModel.load(tiny_folder(kind, "float32"), dtype="float32", attention="eager", threads=1)
    tenants = four_tenants(model.sites, "float32")
    install_all(model, tenants)
    healthy = outcomes(model, tenants, encoding)
    bad = poisoned(tenants[4])  # shares a cohort with tenant 0
    model.install(bad.lease, bad.spec, 0, bad.weights)
    sick = outcomes(model, [*tenants[:4], bad], encoding)
    assert np.isnan(sick[4][0].loss_sum)
    for before, after in zip(healthy[:4], sick[:4], strict=True):
        assert after[0] == before[0]
        assert all(torch.equal(after[1][key], grad) for key, grad in before[1].items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_refused_segments_get_their_reason_and_the_others_are_computed(
    tiny_folder: TinyFolder, kind: str
) -> None:
    model = TappedModel.load(tiny_folder(kind, "float32"), dtype="float32", attention="eager", threads=1)
    tenants = four_tenants(model.sites, "float32")
    install_all(model, tenants[:4])
    good = tenants[0].segment()
    endless = Row(tokens=np.full(257, 9, np.int32), weights=np.ones(257, np.float32))
    foreign = Row(tokens=np.array([5, 261], np.int32), weights=np.ones(2, np.float32))
    segments = [
        replace(tenants[1].segment(), version=1),
        replace(tenants[2].segment(), lease=replace(tenants[2].lease, epoch=0)),
        replace(tenants[3].segment(), lease=replace(tenants[3].lease, epoch=2)),
        tenants[4].segment(),
        replace(good, rows=(endless,)),
        replace(good, rows=(foreign,)),
        replace(good, rows=()),
        good,
    ]
    result, taps = run_segments(model, segments)
    assert [loss.reason for loss in result.losses] == [
        "VERSION_STALE",
        "FENCED",
        "ADAPTER_UNKNOWN",
        "ADAPTER_UNKNOWN",
        "ROW_INVALID",
        "ROW_INVALID",
        "ROW_INVALID",
        None,
    ]
    assert {tap.segment for tap in taps} == {7}
    assert result.losses[7].loss_sum > 0
    assert result.losses[7].weight_sum == pytest.approx(good.loss_denominator)
    assert result.real_tokens == good.tokens
    assert result.computed_tokens == (good.tokens if kind == "llama" else 2 * 17)  # a Llama pads no rows


def test_a_step_of_refused_segments_only_computes_nothing(tiny_folder: TinyFolder) -> None:
    model = TappedModel.load(tiny_folder("llama", "float32"), dtype="float32", threads=1)
    tenants = four_tenants(model.sites, "float32")
    result, taps = run_segments(model, [tenants[0].segment()])
    assert (result.losses[0].reason, result.computed_tokens, taps) == ("ADAPTER_UNKNOWN", 0, [])


def test_a_zero_denominator_spoils_only_its_own_segment(tiny_folder: TinyFolder) -> None:
    model = TappedModel.load(tiny_folder("llama", "float32"), dtype="float32", threads=1)
    tenants = four_tenants(model.sites, "float32")[:2]
    install_all(model, tenants)
    _, healthy = run_segments(model, [member.segment() for member in tenants])
    odd = replace(tenants[1].segment(), loss_denominator=0.0)
    _, taps = run_segments(model, [tenants[0].segment(), odd])
    expected, found = gradients_of(healthy, 0, tenants[0]), gradients_of(taps, 0, tenants[0])
    assert all(torch.equal(found[key], grad) for key, grad in expected.items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_new_version_is_what_the_next_step_computes_with(tiny_folder: TinyFolder, kind: str) -> None:
    model = TappedModel.load(tiny_folder(kind, "float32"), dtype="float32", threads=1)
    first, second = four_tenants(model.sites, "float32")[::4]
    install_all(model, [first, second])
    before, _ = run_segments(model, [first.segment(), second.segment()])
    moved = {key: weight * 2 for key, weight in first.weights.items()}
    model.install(first.lease, first.spec, 1, moved)
    assert model.version(first.job_id) == (1, 1)
    after, _ = run_segments(model, [replace(first.segment(), version=1), second.segment()])
    assert after.losses[0].loss_sum != before.losses[0].loss_sum
    assert after.losses[1] == before.losses[1]
    model.evict(first.job_id)
    gone, _ = run_segments(model, [first.segment()])
    assert model.version(first.job_id) is None
    assert gone.losses[0].reason == "ADAPTER_UNKNOWN"
