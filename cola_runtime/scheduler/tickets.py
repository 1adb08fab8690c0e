"""One microbatch on its way through base steps: what of it still waits, and what its parts have given."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cola_runtime.scheduler.waiting import Part, Waiting
from cola_runtime.types import Priority, Segment, SegmentLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """What one segment cost and gave."""

    loss: SegmentLoss
    base_seconds: float  # its share of the base steps that it was in, by tokens
    base_step: int  # the last of them


@dataclass(slots=True, kw_only=True)
class Ticket:
    """A segment that `SchedulerLoop.compute` was asked for; it goes as one part, or as several."""

    number: int
    tenant_id: str
    segment: Segment
    train: bool
    priority: Priority
    done: asyncio.Future[Computed]
    left: list[int] = field(init=False)  # rows that no base step has taken yet
    _loss_sum: float = 0.0
    _weight_sum: float = 0.0
    _base_seconds: float = 0.0
    _predictions: dict[int, float] = field(default_factory=dict)
    _rows_done: int = 0

    def __post_init__(self) -> None:
        self.left = list(range(len(self.segment.rows)))

    @property
    def device_id(self) -> str:
        return self.segment.lease.device_id

    def waiting(self) -> Waiting:
        """For the fair queue. Its rows are those of `left`, by their numbers in the segment."""
        rows = self.segment.rows
        return Waiting(
            ticket=self.number,
            tenant_id=self.tenant_id,
            job_id=self.segment.lease.job_id,
            rows=tuple(self.left),
            lengths=tuple(rows[row].length for row in self.left),
            train=self.train,
            gang=self.segment.gang,
            priority=self.priority,
        )

    def part(self, part: Part, *, microbatch: int) -> Segment:
        """The segment of these rows, which no longer wait; `microbatch` numbers the parts of a step."""
        taken = set(part.rows)
        self.left = [row for row in self.left if row not in taken]
        whole = self.segment
        return replace(
            whole,
            rows=tuple(whole.rows[row] for row in part.rows),
            row_numbers=tuple(whole.row_number(row) for row in part.rows),
            microbatch=microbatch,
            last_microbatch=whole.last_microbatch and not self.left,
        )

    def add(self, part: Part, loss: SegmentLoss, *, base_seconds: float, base_step: int) -> None:
        """A part was computed. With the last one, or one that was refused, the ticket is done."""
        self._rows_done += len(part.rows)
        self._loss_sum += loss.loss_sum
        self._weight_sum += loss.weight_sum
        self._base_seconds += base_seconds
        self._predictions.update(zip(part.rows, loss.predictions, strict=False))
        complete = self._rows_done == len(self.segment.rows)
        if self.done.done() or not (complete or loss.reason):
            return
        whole = SegmentLoss(
            job_id=loss.job_id,
            loss_sum=self._loss_sum,
            weight_sum=self._weight_sum,
            reason=loss.reason,
            predictions=tuple(self._predictions[row] for row in sorted(self._predictions)),
        )
        self.done.set_result(Computed(loss=whole, base_seconds=self._base_seconds, base_step=base_step))


@dataclass(slots=True, kw_only=True)
class Flight:
    """A base step that was sent."""

    tickets: Sequence[Ticket]
    parts: Sequence[Part]
    padded_tokens: int
    started: float  # when it was sent; once the one before it has ended: that moment


class PartNumbers:
    """Numbers the parts of each job's step from 0, in the order in which they are sent."""

    def __init__(self) -> None:
        self._next: dict[str, tuple[tuple[int, int], int]] = {}

    def take(self, segment: Segment) -> int:
        step = (segment.lease.epoch, segment.trained_version)
        known, number = self._next.get(segment.lease.job_id, (step, 0))
        number = number if known == step else 0
        self._next[segment.lease.job_id] = (step, number + 1)
        return number

    def step_sent(self, job_id: str) -> None:
        self._next.pop(job_id, None)
