"""A base step that runs out of memory is computed in halves: the same losses and gradients, each tap once."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace

import pytest
import torch

from cola_runtime.base_model.model import TappedModel
from cola_runtime.base_model.workspace import Workspace
from cola_runtime.encodings import Encoding
from cola_runtime.gradients.taps import Tap
from cola_runtime.testing.peft_reference import relative_difference
from cola_runtime.types import BaseStep, Segment
from tests.base_model.conftest import TinyFolder
from tests.base_model.mixed_samples import Tenant, four_tenants, gradients_of, install_all, run_segments


class Shortage:
    """Allocations of more numbers than `most` fail, as torch's do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 1 << 60
        self.failures = 0
        self.error: Exception = torch.OutOfMemoryError("CUDA out of memory (so says the test)")
        allocated = Workspace._allocated

        def limited(space: Workspace, name: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
            of_rows = name.startswith(("layer", "passing"))  # other buffers are of labels, or of adapters
            if of_rows and numel > self.most:
                self.failures += 1
                raise self.error
            return allocated(space, name, numel, dtype)

        monkeypatch.setattr(Workspace, "_allocated", limited)


@pytest.fixture
def shortage(monkeypatch: pytest.MonkeyPatch) -> Shortage:
    return Shortage(monkeypatch)


def prepared(tiny_folder: TinyFolder, accelerator: str) -> tuple[TappedModel, list[Tenant]]:
    model = TappedModel.load(tiny_folder("llama", "float64"), dtype="float64", accelerator=accelerator)
    tenants = four_tenants(model.sites, "float64")
    install_all(model, tenants)
    return model, tenants


def assert_same(found: tuple, expected: tuple, tenants: list[Tenant]) -> None:
    for mine, theirs in zip(found[0].losses, expected[0].losses, strict=True):
        assert mine.reason is None
        assert mine.loss_sum == pytest.approx(theirs.loss_sum, rel=1e-10)
        assert mine.weight_sum == theirs.weight_sum
    for position, member in enumerate(tenants):
        pair = [gradients_of(taps, position, member) for _, taps in (found, expected)]
        assert max(relative_difference(*pair).values()) < 1e-10


@pytest.mark.parametrize("encoding", list(Encoding))
def test_halves_give_the_gradients_of_the_whole(
    tiny_folder: TinyFolder,
    accelerator: str,
    encoding: Encoding,
    shortage: Shortage,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, tenants = prepared(tiny_folder, accelerator)
    segments = [member.segment(encoding) for member in tenants]
    whole = run_segments(prepared(tiny_folder, accelerator)[0], segments)
    shortage.most = 3 * 32 * 96  # numbers: three rows' intermediate features
    with caplog.at_level(logging.WARNING):
        halves = run_segments(model, segments)
    assert shortage.failures > 0
    assert "base.out_of_memory" in [getattr(record, "event", None) for record in caplog.records]
    assert_same(halves, whole, tenants)
    before = shortage.failures
    assert_same(run_segments(model, segments), whole, tenants)
    assert shortage.failures == before  # what did not fit is not tried again


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_what_the_cpu_refuses_is_halved_too(
    tiny_folder: TinyFolder, accelerator: str, shortage: Shortage, error: Exception
) -> None:
    model, tenants = prepared(tiny_folder, accelerator)
    segments = [member.segment() for member in tenants]
    whole = run_segments(prepared(tiny_folder, accelerator)[0], segments)
    shortage.most, shortage.error = 3 * 32 * 96, error
    assert_same(run_segments(model, segments), whole, tenants)
    assert shortage.failures > 0


def test_another_error_of_a_pass_is_no_shortage(
    tiny_folder: TinyFolder, accelerator: str, shortage: Shortage
) -> None:
    model, tenants = prepared(tiny_folder, accelerator)
    shortage.most, shortage.error = 3 * 32 * 96, RuntimeError("shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes"):
        run_segments(model, [member.segment() for member in tenants])
    assert shortage.failures == 1


@pytest.mark.parametrize("encoding", list(Encoding))
def test_taps_that_had_left_before_memory_ran_out_do_not_leave_again(
    tiny_folder: TinyFolder, accelerator: str, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward pass fails half way down, once as a whole and once in the first half."""
    model, tenants = prepared(tiny_folder, accelerator)
    segments = [member.segment(encoding) for member in tenants]
    whole = run_segments(prepared(tiny_folder, accelerator)[0], segments)
    body = model._pass.body
    backward, fails = body._attention_backward, iter([3, 5])
    countdown = [next(fails)]

    def failing(*arguments: object) -> None:
        countdown[0] -= 1
        if countdown[0] == 0:
            countdown[0] = next(fails, 0)
            raise torch.OutOfMemoryError("CUDA out of memory (so says the test)")
        backward(*arguments)

    monkeypatch.setattr(body, "_attention_backward", failing)
    halves = run_segments(model, segments)
    assert_same(halves, whole, tenants)
    rows = Counter(_tap_name(tap) for tap in halves[1])
    assert max(rows.values()) > 1  # some sites' taps came in parts
    assert min(rows.values()) == 1  # and the upper ones', which had left, did not


def test_a_row_that_does_not_fit_alone_is_refused_and_its_neighbours_are_not(
    tiny_folder: TinyFolder, accelerator: str, shortage: Shortage
) -> None:
    model, tenants = prepared(tiny_folder, accelerator)
    long = replace(tenants[1], rows=(_row_of(200, tenants[1]),))
    segments: list[Segment] = [tenants[0].segment(), long.segment(), tenants[2].segment()]
    shortage.most = 100 * 96
    result = model.run(BaseStep(number=1, segments=tuple(segments)), lambda _tap: None)
    assert [loss.reason for loss in result.losses] == [None, "OUT_OF_MEMORY", None]


def test_rows_that_are_only_judged_are_halved_too(
    tiny_folder: TinyFolder, accelerator: str, shortage: Shortage
) -> None:
    model, tenants = prepared(tiny_folder, accelerator)
    segments = [member.segment() for member in tenants]
    whole, _ = run_segments(prepared(tiny_folder, accelerator)[0], segments, train=False)
    shortage.most = 3 * 32 * 96
    halves, _ = run_segments(model, segments, train=False)
    assert shortage.failures > 0
    for mine, theirs in zip(halves.losses, whole.losses, strict=True):
        assert mine.loss_sum == pytest.approx(theirs.loss_sum, rel=1e-10)


def _tap_name(tap: Tap) -> tuple[int, frozenset]:
    return tap.segment, frozenset(tap.tensors)


def _row_of(length: int, member: Tenant):
    row = member.rows[0]
    return replace(row, tokens=row.tokens[:1].repeat(length), weights=row.weights[-1:].repeat(length))
