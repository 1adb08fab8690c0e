"""Spans of time of one process, in a bounded buffer. Imports the standard library only.

While recording is off a span costs the look at `on`; while it is on, one tuple in a ring. Times are
`time.monotonic()` of the process; who puts several processes' spans together brings their clocks to one
(`ClockExchange`).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

CAPACITY = 65_536  # spans that a process keeps; the newest stay
MOST_LANES = 4096

Detail = str | int | float


class Span(NamedTuple):
    """Something that a process did from `begin` to `end`."""

    lane: str  # what it was done in, one after the other: a thread, a stream, a job
    name: str  # of few words, the same for all of its kind
    begin: float
    end: float
    details: Mapping[str, Detail]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpans:
    """What one process recorded, and what its clock said when it answered."""

    now: float
    spans: tuple[Span, ...]
    recorded: int  # so many in all; those above `len(spans)` are forgotten, the oldest ones


class SpanRecorder:
    """Written from any thread; `start` and `stop` belong to whoever owns it."""

    def __init__(self, *, capacity: int = CAPACITY) -> None:
        self.on = False
        self._spans: deque[Span] = deque(maxlen=capacity)
        self._numbers = itertools.count()
        self._recorded = 0

    def add(self, lane: str, name: str, *, begin: float, end: float, **details: Detail) -> None:
        if self.on:
            self._recorded = next(self._numbers) + 1
            self._spans.append(Span(lane, name, begin, end, details))

    def switch(self, on: bool, *, now: float) -> ProcessSpans:
        """Record from now on, or no more; returns what was recorded until now.

        Switching on what is on forgets nothing; what was recorded is forgotten when it is switched on anew.
        """
        if on and not self.on:
            self._spans.clear()
            self._numbers, self._recorded = itertools.count(), 0
        self.on = on
        return ProcessSpans(now=now, spans=() if on else tuple(self._spans), recorded=self._recorded)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockExchange:
    """One question to another process: asked and answered on our clock, `theirs` on its own in between."""

    asked: float
    answered: float
    theirs: float

    @property
    def offset(self) -> float:
        """Added to a time of the other process it is a time of ours, if both ways took as long."""
        return (self.asked + self.answered) / 2 - self.theirs

    @property
    def error(self) -> float:
        """The offset is wrong by no more than this."""
        return (self.answered - self.asked) / 2


def best_exchange(exchanges: Iterable[ClockExchange]) -> ClockExchange:
    """The one that tells most of the other clock."""
    return min(exchanges, key=lambda exchange: exchange.error)
