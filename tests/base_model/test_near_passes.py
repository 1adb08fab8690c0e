"""Rows of far lengths go through several passes: less padding, the same losses, gradients and taps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cola_runtime.base_model.fitting import FittingPasses
from cola_runtime.base_model.model import TappedModel
from cola_runtime.base_model.near_passes import NearPasses, Outcomes
from cola_runtime.base_model.near_sizes import near_rows
from cola_runtime.base_model.segments import Member
from cola_runtime.encodings import Encoding
from cola_runtime.gradients.taps import Tap, TapSink
from cola_runtime.rows import Row
from cola_runtime.testing.peft_reference import relative_difference
from cola_runtime.types import Lease, Segment, SegmentLoss, TensorKey, TensorKind
from tests.base_model.conftest import TinyFolder
from tests.base_model.mixed_samples import (
    Tenant,
    four_tenants,
    gradients_of,
    install_all,
    random_row,
    run_segments,
)

ONE_PASS = 10**9  # tokens that a further pass would cost: none is made
LENGTHS = [(150, 9, 12, 140), (29, 160), (11,), (8, 8), (155, 25, 10)]
UPPER, LOWER = TensorKey(3, TensorKind.GRAD_LORA_A), TensorKey(1, TensorKind.GRAD_LORA_A)


def loaded(tiny_folder: TinyFolder, dtype: str) -> tuple[TappedModel, list[Tenant]]:
    model = TappedModel.load(tiny_folder("gpt2", dtype), dtype=dtype, attention="eager", threads=1)
    of_all = four_tenants(model.sites, "float64" if dtype == "float64" else "float32")
    tenants = [
        replace(member, rows=tuple(random_row(length, seed=9 * k + n) for n, length in enumerate(lengths)))
        for k, (member, lengths) in enumerate(zip(of_all, LENGTHS, strict=True))
    ]
    install_all(model, tenants)
    return model, tenants


def in_one_pass(model: TappedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_passes", model._pass.compute)


@pytest.mark.parametrize("encoding", list(Encoding))
def test_passes_of_near_lengths_give_one_passes_gradients_with_less_padding(
    tiny_folder: TinyFolder, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tenants = loaded(tiny_folder, "float64")
    segments = [member.segment(encoding) for member in tenants]
    assert model.describe("", "").unpadded
    near, near_taps = run_segments(model, segments)
    in_one_pass(model, monkeypatch)
    whole, whole_taps = run_segments(model, segments)
    assert near.real_tokens == whole.real_tokens == sum(map(sum, LENGTHS))
    assert whole.computed_tokens == 12 * 160
    assert near.computed_tokens == 4 * 160 + 6 * 12 + 2 * 29
    for position, member in enumerate(tenants):
        assert near.losses[position].loss_sum == pytest.approx(whole.losses[position].loss_sum, rel=1e-12)
        assert near.losses[position].weight_sum == whole.losses[position].weight_sum
        found, expected = (gradients_of(taps, position, member) for taps in (near_taps, whole_taps))
        assert max(relative_difference(found, expected).values()) < 1e-10
    if encoding is not Encoding.ACTIVATIONS:
        names = [(tap.segment, frozenset(tap.tensors)) for tap in near_taps]
        assert sorted(map(str, names)) == sorted(
            str((tap.segment, frozenset(tap.tensors))) for tap in whole_taps
        )
        assert len(set(names)) == len(names)


def test_a_sum_of_passes_in_bfloat16_is_as_near_to_float32_as_one_pass(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact_model, tenants = loaded(tiny_folder, "float32")
    _, exact = run_segments(exact_model, [member.segment() for member in tenants])
    model, _ = loaded(tiny_folder, "bfloat16")
    segments = [member.segment() for member in tenants]
    _, near = run_segments(model, segments)
    in_one_pass(model, monkeypatch)
    _, whole = run_segments(model, segments)
    for position, member in enumerate(tenants):
        expected = gradients_of(exact, position, member)
        errors = [
            max(relative_difference(gradients_of(taps, position, member), expected).values())
            for taps in (near, whole)
        ]
        assert errors[0] < 1.05 * errors[1]


def test_evaluation_is_cut_too_and_tells_the_same_losses(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tenants = loaded(tiny_folder, "float64")
    segments = [member.segment(Encoding.WEIGHT_GRADIENT) for member in tenants]
    near, _ = run_segments(model, segments, train=False)
    in_one_pass(model, monkeypatch)
    whole, _ = run_segments(model, segments, train=False)
    assert near.computed_tokens < whole.computed_tokens / 2
    for mine, theirs in zip(near.losses, whole.losses, strict=True):
        assert mine.loss_sum == pytest.approx(theirs.loss_sum, rel=1e-12)


def row(length: int, source: int = 0) -> Row:
    of_source = np.arange(source, dtype=np.int32) if source else None
    return Row(
        tokens=np.arange(length, dtype=np.int32), weights=np.ones(length, np.float32), source=of_source
    )


def member(position: int, lengths: Sequence[int]) -> Member:
    segment = Segment(
        lease=Lease(job_id=f"job-{position}", epoch=1, device_id="device"),
        version=0,
        rows=tuple(map(row, lengths)),
        loss_denominator=1.0,
        first_row=5,
    )
    adapter: Any = None  # nobody looks at it
    return Member(position=position, segment=segment, adapter=adapter)


class Passes:
    """A row's loss is its length, its prediction its number, its gradient both.

    With too many rows memory runs out when the first tap has left.
    """

    def __init__(self, *, most_rows: int = 1000, dtype: torch.dtype = torch.float32) -> None:
        self.most_rows, self.dtype = most_rows, dtype
        self.seen: list[list[Member]] = []

    def __call__(self, members: Sequence[Member], sink: TapSink | None) -> tuple[Outcomes, int]:
        too_many = sum(len(each.segment.rows) for each in members) > self.most_rows
        self.seen.append(list(members))
        outcomes, rows = {}, 0
        for each in members:
            lengths = [row.length for row in each.segment.rows]
            rows += len(lengths)
            outcomes[each.position] = SegmentLoss(
                job_id=each.segment.lease.job_id,
                loss_sum=float(sum(lengths)),
                weight_sum=float(len(lengths)),
                predictions=tuple(map(float, each.row_numbers)),
            )
            for key in (UPPER, LOWER):
                if sink is not None:
                    gradient = torch.tensor([sum(lengths), sum(each.row_numbers)], dtype=self.dtype)
                    sink(Tap(each.position, {key: gradient}))
                if too_many:
                    raise MemoryError
        longest = max(row.length for each in members for row in each.segment.rows)
        return outcomes, rows * longest


@given(
    st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=5), min_size=1, max_size=5),
    st.integers(0, 40),
    st.integers(1, 12),
    st.booleans(),
)
def test_every_row_counts_once_whatever_is_cut_and_whatever_does_not_fit(
    lengths: list[list[int]], further: int, most_rows: int, train: bool
) -> None:
    passes = Passes(most_rows=most_rows)
    members = [member(position, of_member) for position, of_member in enumerate(lengths)]
    fitting = FittingPasses(passes, lambda: None)
    taps: list[Tap] = []
    outcomes, tokens = NearPasses(fitting.compute, further=further).compute(
        members, taps.append if train else None
    )
    assert tokens >= sum(map(sum, lengths))
    assert outcomes.keys() == set(range(len(members)))
    for position, of_member in enumerate(lengths):
        found = outcomes[position]
        assert (found.loss_sum, found.weight_sum) == (sum(of_member), len(of_member))
        assert found.predictions == tuple(5.0 + number for number in range(len(of_member)))
        for key in (UPPER, LOWER) if train else ():
            of_key = [tap.tensors[key] for tap in taps if tap.segment == position and key in tap.tensors]
            assert sum(of_key).tolist() == [sum(of_member), sum(5 + n for n in range(len(of_member)))]


def test_sums_leave_in_the_last_pass_deepest_first_and_whole_segments_at_once() -> None:
    passes = Passes()
    taps: list[Tap] = []
    at_pass: list[int] = []

    def sink(tap: Tap) -> None:
        taps.append(tap)
        at_pass.append(len(passes.seen))

    NearPasses(passes, further=1).compute([member(0, [3, 50, 90]), member(1, [3]), member(2, [51])], sink)
    assert [
        (tap.segment, next(iter(tap.tensors)), number) for tap, number in zip(taps, at_pass, strict=True)
    ] == [
        (1, UPPER, 1),
        (1, LOWER, 1),
        (2, UPPER, 2),
        (2, LOWER, 2),
        (0, UPPER, 3),
        (0, LOWER, 3),
    ]


def test_a_sum_in_sixteen_bits_is_rounded_once() -> None:
    taps: list[Tap] = []
    NearPasses(Passes(dtype=torch.bfloat16), further=0).compute([member(0, [129, 130, 131])], taps.append)
    assert taps[0].tensors[UPPER].dtype == torch.bfloat16
    assert taps[0].tensors[UPPER].tolist()[0] == 390.0  # rounded each time: 259 -> 260, 391 -> 392


def test_what_finds_no_room_leaves_pass_by_pass_and_room_comes_back() -> None:
    """Tensors of eight bytes: in the first pass room for three of four."""
    taps: list[Tap] = []
    near = NearPasses(Passes(), further=1, held_bytes=24)
    near.compute([member(0, [3, 50]), member(1, [3, 50, 90])], taps.append)
    found: dict[tuple[int, TensorKey], list[float]] = {}
    for tap in taps:
        for key, tensor in tap.tensors.items():
            found.setdefault((tap.segment, key), []).append(tensor.tolist()[0])
    assert found == {
        (0, UPPER): [53.0],
        (0, LOWER): [53.0],
        (1, UPPER): [143.0],
        (1, LOWER): [3.0, 140.0],  # in the second pass it waits where the first segment's sums were
    }


def test_a_part_that_is_refused_refuses_its_segment_alone() -> None:
    def passes(members: Sequence[Member], _sink: TapSink | None) -> tuple[Outcomes, int]:
        return {
            each.position: SegmentLoss(
                job_id=each.segment.lease.job_id,
                reason="OUT_OF_MEMORY" if each.segment.rows[0].length > 80 else None,
            )
            for each in members
        }, 1

    outcomes, tokens = NearPasses(passes, further=1).compute([member(0, [3, 90]), member(1, [3, 50])], None)
    assert [outcomes[position].reason for position in (0, 1)] == ["OUT_OF_MEMORY", None]
    assert tokens == 3


@given(
    st.lists(st.tuples(st.integers(1, 20), st.sampled_from((0, 3, 9, 15))), max_size=9), st.integers(0, 30)
)
def test_rows_with_sources_are_cut_no_dearer_than_into_one_part_or_each_for_itself(
    sizes: list[tuple[int, int]], further: int
) -> None:
    def cost(parts: Sequence[Sequence[int]]) -> int:
        return sum(
            further + len(part) * sum(max(sizes[n][side] for n in part) for side in (0, 1)) for part in parts
        )

    parts = near_rows(sizes, further=further)
    assert sorted(n for part in parts for n in part) == list(range(len(sizes)))
    singles = [[n] for n in range(len(sizes))]
    assert cost(parts) <= min(cost(singles), cost([list(range(len(sizes)))] if sizes else []))
    of_size = Counter(size for part in parts for size in {sizes[n] for n in part})
    assert all(count == 1 for count in of_size.values())
