"""Base steps that do not fit in memory are computed in parts, and nothing of them is handed out twice.

A pass that runs out of memory may have handed out taps of its upper layers. They are right: a tap depends on
its own rows alone. So the rows go through two passes of half the size, and of a segment whose tap at a site
has left already, the halves' taps there are dropped. Gradients add up over rows, whatever the number of taps.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from cola_runtime.base_model.parts import OnePass, Outcomes, in_parts
from cola_runtime.base_model.segments import Member
from cola_runtime.gradients.taps import Tap, TapSink
from cola_runtime.machine import is_memory_refused
from cola_runtime.types import SegmentLoss, TensorKey

OUT_OF_MEMORY = "OUT_OF_MEMORY"
GROWTH_PASSES = 1000  # passes in a row that fit double the tokens that one may have again

logger = logging.getLogger(__name__)


class FittingPasses:
    """Remembers how large a pass may be. Owned by the compute thread."""

    def __init__(self, one_pass: OnePass, let_go: Callable[[], None]) -> None:
        """`let_go` gives back memory between passes, and returns when every tap has been handed out."""
        self._one_pass, self._let_go = one_pass, let_go
        self._most_tokens: int | None = None  # of one pass; None: whatever is asked for
        self._fitted = 0  # passes since it was last changed

    def compute(self, members: Sequence[Member], sink: TapSink | None) -> tuple[Outcomes, int]:
        """The outcomes and computed tokens of the passes that it takes.

        A segment with a row that does not fit alone is refused: `OUT_OF_MEMORY`.
        """
        if _rows(members) > 1 and self._most_tokens is not None and _tokens(members) > self._most_tokens:
            return self._in_halves(members, sink)
        delivered = None if sink is None else _Delivered(sink)
        found = self._attempt(members, delivered)
        if found is not None:
            self._grow()
            return found
        self._let_go()
        logger.warning(
            "a base step of %d tokens does not fit in memory: in halves", _tokens(members),
            extra={"event": "base.out_of_memory", "tokens": _tokens(members), "rows": _rows(members)},
        )  # fmt: skip
        if _rows(members) == 1:
            job_id = members[0].segment.lease.job_id
            return {members[0].position: SegmentLoss(job_id=job_id, reason=OUT_OF_MEMORY)}, 0
        self._most_tokens, self._fitted = max(1, _tokens(members) // 2), 0
        return self._in_halves(members, None if delivered is None else delivered.rest())

    def _attempt(self, members: Sequence[Member], sink: TapSink | None) -> tuple[Outcomes, int] | None:
        """None where memory ran out; nothing refers to the pass's tensors then."""
        try:
            return self._one_pass(members, sink)
        except (MemoryError, RuntimeError) as error:  # an accelerator's is a RuntimeError, too
            if not is_memory_refused(error):
                raise
            traceback.clear_frames(error.__traceback__)
        return None

    def _in_halves(self, members: Sequence[Member], sink: TapSink | None) -> tuple[Outcomes, int]:
        return in_parts(_halves(members), lambda half: self.compute(half, sink))

    def _grow(self) -> None:
        """Memory may have been another process's for a while."""
        self._fitted += 1
        if self._most_tokens is not None and self._fitted == GROWTH_PASSES:
            self._most_tokens, self._fitted = 2 * self._most_tokens, 0


@dataclass(frozen=True, slots=True)
class _Delivered:
    """A sink that notes what it has passed on."""

    sink: TapSink
    taps: set[tuple[int, frozenset[TensorKey]]] = field(default_factory=set)

    def __call__(self, tap: Tap) -> None:
        self.sink(tap)
        self.taps.add(_name(tap))

    def rest(self) -> TapSink:
        """Passes on what this has not."""
        return _Rest(self.sink, frozenset(self.taps))


@dataclass(frozen=True, slots=True)
class _Rest:
    sink: TapSink
    delivered: Collection[tuple[int, frozenset[TensorKey]]]

    def __call__(self, tap: Tap) -> None:
        if _name(tap) not in self.delivered:
            self.sink(tap)


def _name(tap: Tap) -> tuple[int, frozenset[TensorKey]]:
    """One segment has one tap of a name in a pass."""
    return tap.segment, frozenset(tap.tensors)


def _rows(members: Sequence[Member]) -> int:
    return sum(len(member.segment.rows) for member in members)


def _tokens(members: Sequence[Member]) -> int:
    """Padded to the longest row."""
    return _rows(members) * max(row.length for member in members for row in member.segment.rows)


def _halves(members: Sequence[Member]) -> tuple[list[Member], list[Member]]:
    """The first half of the rows and the others, both in order; a segment may be in both."""
    left = _rows(members) // 2
    first: list[Member] = []
    second: list[Member] = []
    for member in members:
        count = len(member.segment.rows)
        if 0 < left < count:
            first.append(member.part(range(left)))
            second.append(member.part(range(left, count)))
        else:
            (first if left > 0 else second).append(member)
        left -= count
    return first, second
