"""One microbatch on its way through a base step, and the base steps that are under way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from cola_runtime.scheduler.waiting import Waiting
from cola_runtime.types import Segment, SegmentLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """What one segment cost and gave."""

    loss: SegmentLoss
    base_seconds: float  # its share of the base step that it was in, by tokens
    base_step: int


@dataclass(slots=True, kw_only=True)
class Ticket:
    """A segment that `SchedulerLoop.compute` was asked for."""

    waiting: Waiting
    segment: Segment
    done: asyncio.Future[Computed]
    asked: float  # time.monotonic()
    sent: bool = False

    @property
    def number(self) -> int:
        return self.waiting.ticket

    @property
    def device_ids(self) -> tuple[str, ...]:
        """Those that must have credit for it: none when nothing is trained."""
        return self.segment.lease.device_ids if self.waiting.train else ()


@dataclass(slots=True, kw_only=True)
class Flight:
    """A base step that was sent."""

    tickets: Sequence[Ticket]
    padded_tokens: int
    started: float  # when it was sent; once the one before it has ended: that moment
