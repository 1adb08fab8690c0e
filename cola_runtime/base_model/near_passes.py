"""A base step of a model that pads its rows, as several passes of rows of near lengths.

Padding is computed like any other token, so rows of other lengths go through a pass of their own where that
is cheaper. Gradients add up over rows: of a segment whose rows are in several passes the sums are handed out,
in the last of them, as if there had been one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cola_runtime.base_model.near_sizes import near_rows
from cola_runtime.base_model.parts import OnePass, Outcomes, in_parts
from cola_runtime.base_model.segments import Member
from cola_runtime.gradients.taps import Tap, TapSink
from cola_runtime.types import TensorKey, TensorKind

PASS_TOKENS = 32  # what a further pass costs on a processor, in computed tokens (docs/performance.md)
HELD_BYTES = 512 << 20
"""Of sums that wait for their segments' last passes. What finds no room leaves at once, pass by pass."""

_PER_ROW = (TensorKind.INPUT, TensorKind.OUTPUT_GRADIENT)  # of rows, which are sent once whatever the passes
_SUM_DTYPES = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


class NearPasses:
    """What computes base steps in passes of near lengths. Owned by the compute thread."""

    def __init__(self, passes: OnePass, *, further: int = PASS_TOKENS, held_bytes: int = HELD_BYTES) -> None:
        """`passes` computes rows together and has handed out their taps when it returns."""
        self._passes, self._further, self._held_bytes = passes, further, held_bytes

    def compute(self, members: Sequence[Member], sink: TapSink | None) -> tuple[Outcomes, int]:
        """The outcomes and computed tokens of all passes."""
        parts = self._parts(members)
        if len(parts) == 1:
            return self._passes(members, sink)
        sums = None if sink is None else _SummedTaps(sink, parts, self._held_bytes)

        def compute(part: Sequence[Member]) -> tuple[Outcomes, int]:
            found = self._passes(part, sums)
            if sums is not None:
                sums.end_pass(part)
            return found

        return in_parts(parts, compute)

    def _parts(self, members: Sequence[Member]) -> list[list[Member]]:
        """Each one pass's members, of the shortest rows first; a segment may be in several."""
        rows = [
            (place, number) for place, each in enumerate(members) for number in range(len(each.segment.rows))
        ]
        sizes = [
            (row.length - row.source_length, row.source_length)
            for member in members
            for row in member.segment.rows
        ]
        parts = []
        for near in near_rows(sizes, further=self._further):
            of_members: dict[int, list[int]] = {}
            for place, number in sorted(rows[each] for each in near):
                of_members.setdefault(place, []).append(number)
            parts.append([members[place].part(numbers) for place, numbers in of_members.items()])
        return parts


class _SummedTaps:
    """A sink that adds up what comes of a segment in several passes, and passes it on in the last of them."""

    def __init__(self, sink: TapSink, parts: Sequence[Sequence[Member]], held_bytes: int) -> None:
        self._sink = sink
        self._left = Counter(member.position for part in parts for member in part)  # passes, by segment
        self._sums: dict[int, dict[tuple[TensorKey, ...], _Sum]] = {}
        self._room = held_bytes

    def __call__(self, tap: Tap) -> None:
        sums, name = self._sums.setdefault(tap.segment, {}), tuple(tap.tensors)
        last = self._left[tap.segment] == 1
        if any(key.kind in _PER_ROW for key in name) or (name not in sums and (last or not self._fits(tap))):
            self._sink(tap)
            return
        if name not in sums:
            sums[name] = _Sum(tap.tensors)
            self._room -= sums[name].nbytes
        else:
            sums[name].add(tap.tensors)
        if last:
            self._hand_out(tap.segment, sums.pop(name))

    def end_pass(self, members: Sequence[Member]) -> None:
        """All taps of the pass have come."""
        for member in members:
            self._left[member.position] -= 1
            if not self._left[member.position]:
                for rest in self._sums.pop(member.position, {}).values():  # the last pass had nothing of it
                    self._hand_out(member.position, rest)

    def _fits(self, tap: Tap) -> bool:
        return _nbytes(tap.tensors) <= self._room

    def _hand_out(self, segment: int, held: _Sum) -> None:
        self._room += held.nbytes
        self._sink(Tap(segment, held.rounded()))


class _Sum:
    """Of one input group's tensors, in 32 bits at least: rounded once, whatever the number of passes."""

    def __init__(self, tensors: Mapping[TensorKey, Tensor]) -> None:
        self._dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
        self._tensors = {key: tensor.to(_wide(tensor), copy=True) for key, tensor in tensors.items()}
        self.nbytes = _nbytes(tensors)

    def add(self, tensors: Mapping[TensorKey, Tensor]) -> None:
        for key, tensor in tensors.items():
            self._tensors[key] += tensor

    def rounded(self) -> dict[TensorKey, Tensor]:
        return {key: tensor.to(self._dtypes[key]) for key, tensor in self._tensors.items()}


def _wide(tensor: Tensor) -> torch.dtype:
    return _SUM_DTYPES.get(tensor.dtype, tensor.dtype)


def _nbytes(tensors: Mapping[TensorKey, Tensor]) -> int:
    """Of their sum."""
    return sum(tensor.numel() * _wide(tensor).itemsize for tensor in tensors.values())
