"""A base step of a model that pads its rows, as several passes of rows of near lengths.

Padding is computed like any other token, so rows of other lengths go through a pass of their own where that
is cheaper. Gradients add up over rows: of a segment whose rows are in several passes the sums are handed out,
in the last of them, as if there had been one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cola_runtime.base_model.near_sizes import near_rows
from cola_runtime.base_model.segments import Member
from cola_runtime.encodings import Encoding
from cola_runtime.gradients.taps import Tap, TapSink
from cola_runtime.rows import Row
from cola_runtime.types import SegmentLoss, TensorKey, TensorKind

PASS_TOKENS = 32  # what a further pass costs on a processor, in computed tokens (docs/performance.md)
HELD_BYTES = 512 << 20
"""Of sums that wait for their segments' last passes: segments beyond stay whole."""

Outcomes = dict[int, SegmentLoss]
"""Position in BaseStep.segments -> loss."""
Passes = Callable[[Sequence[Member], TapSink | None], tuple[Outcomes, int]]

_PER_ROW = (TensorKind.INPUT, TensorKind.OUTPUT_GRADIENT)  # of rows, which are sent once whatever the passes
_SUM_DTYPES = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


class NearPasses:
    """What computes base steps in passes of near lengths. Owned by the compute thread."""

    def __init__(self, passes: Passes, *, further: int = PASS_TOKENS, held_bytes: int = HELD_BYTES) -> None:
        """`passes` computes rows together and hands out their taps before it returns."""
        self._passes, self._further, self._held_bytes = passes, further, held_bytes

    def compute(self, members: Sequence[Member], sink: TapSink | None) -> tuple[Outcomes, int]:
        """The outcomes and computed tokens of all passes."""
        parts = self._parts(members, train=sink is not None)
        if len(parts) == 1:
            return self._passes(members, sink)
        sums = None if sink is None else _SummedTaps(sink, parts)
        found: list[tuple[Member, SegmentLoss]] = []
        tokens = 0
        for part in parts:
            outcomes, more = self._passes(part, sums)
            tokens += more
            found += ((member, outcomes[member.position]) for member in part)
            if sums is not None:
                sums.end_pass(part)
        by_position: dict[int, list[tuple[Member, SegmentLoss]]] = {}
        for member, loss in found:
            by_position.setdefault(member.position, []).append((member, loss))
        return {position: _joined(losses) for position, losses in by_position.items()}, tokens

    def _parts(self, members: Sequence[Member], *, train: bool) -> list[list[Member]]:
        """Each one pass's members, of the shortest rows first; a segment may be in several."""
        whole = self._whole(members) if train else frozenset()
        rows: list[tuple[int, int]] = []  # (place of the member, place of the row)
        sizes: list[tuple[int, int]] = []
        for place, member in enumerate(members):
            of_member = [_size(row) for row in member.segment.rows]
            rows += ((place, number) for number in range(len(of_member)))
            sizes += [_largest(of_member)] * len(of_member) if place in whole else of_member
        parts = []
        for near in near_rows(sizes, further=self._further):
            of_members: dict[int, list[int]] = {}
            for place, number in sorted(rows[each] for each in near):
                of_members.setdefault(place, []).append(number)
            parts.append([_part(members[place], numbers) for place, numbers in of_members.items()])
        return parts

    def _whole(self, members: Sequence[Member]) -> frozenset[int]:
        """Places of the members that stay in one pass: sums of theirs would be too large to wait."""
        whole, left = [], float(self._held_bytes)
        for place, member in enumerate(members):
            if len(set(map(_size, member.segment.rows))) == 1:
                continue
            needed = _held_bytes(member)
            if needed > left:
                whole.append(place)
            else:
                left -= needed
        return frozenset(whole)


class _SummedTaps:
    """A sink that adds up what comes of a segment in several passes, and passes it on in the last of them."""

    def __init__(self, sink: TapSink, parts: Sequence[Sequence[Member]]) -> None:
        self._sink = sink
        self._left = Counter(member.position for part in parts for member in part)  # passes, by segment
        self._sums: dict[int, dict[tuple[TensorKey, ...], _Sum]] = {}

    def __call__(self, tap: Tap) -> None:
        sums, name = self._sums.setdefault(tap.segment, {}), tuple(tap.tensors)
        last = self._left[tap.segment] == 1
        if any(key.kind in _PER_ROW for key in name) or (last and name not in sums):
            self._sink(tap)
            return
        sums.setdefault(name, _Sum()).add(tap.tensors)
        if last:
            self._sink(Tap(tap.segment, sums.pop(name).rounded()))

    def end_pass(self, members: Sequence[Member]) -> None:
        """All taps of the pass have come."""
        for member in members:
            self._left[member.position] -= 1
            if not self._left[member.position]:
                for rest in self._sums.pop(member.position, {}).values():  # the last pass had nothing of it
                    self._sink(Tap(member.position, rest.rounded()))


class _Sum:
    """Of one input group's tensors, in 32 bits at least: rounded once, whatever the number of passes."""

    def __init__(self) -> None:
        self._tensors: dict[TensorKey, Tensor] = {}
        self._dtypes: dict[TensorKey, torch.dtype] = {}

    def add(self, tensors: Mapping[TensorKey, Tensor]) -> None:
        for key, tensor in tensors.items():
            if key in self._tensors:
                self._tensors[key] += tensor
            else:
                self._dtypes[key] = tensor.dtype
                self._tensors[key] = tensor.to(_SUM_DTYPES.get(tensor.dtype, tensor.dtype), copy=True)

    def rounded(self) -> dict[TensorKey, Tensor]:
        return {key: tensor.to(self._dtypes[key]) for key, tensor in self._tensors.items()}


def _size(row: Row) -> tuple[int, int]:
    """Tokens of the row, and of its source."""
    return row.length - row.source_length, row.source_length


def _largest(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return max(tokens for tokens, _ in sizes), max(source for _, source in sizes)


def _part(member: Member, places: Sequence[int]) -> Member:
    return member if len(places) == len(member.segment.rows) else member.part(places)


def _held_bytes(member: Member) -> float:
    """At most, of a segment that is cut."""
    taps = member.segment.taps
    encodings = {taps.encoding, *(encoding for _, encoding in taps.exceptions)}
    if Encoding.WEIGHT_GRADIENT in encodings:
        return float("inf")
    if encodings == {Encoding.ACTIVATIONS}:
        return 0
    weights_P = member.adapter.flat
    return weights_P.numel() * max(4, weights_P.element_size())


def _joined(losses: Sequence[tuple[Member, SegmentLoss]]) -> SegmentLoss:
    """Of a segment's parts; predictions in the order of its rows."""
    first = losses[0][1]
    reason = next((loss.reason for _, loss in losses if loss.reason), None)
    if reason is not None:
        return SegmentLoss(job_id=first.job_id, reason=reason)
    by_row = [
        pair
        for member, loss in losses
        for pair in zip(member.row_numbers, loss.predictions, strict=bool(loss.predictions))
    ]
    return replace(
        first,
        loss_sum=sum(loss.loss_sum for _, loss in losses),
        weight_sum=sum(loss.weight_sum for _, loss in losses),
        predictions=tuple(prediction for _, prediction in sorted(by_row)),
    )
