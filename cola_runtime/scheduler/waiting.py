"""What waits for the base model, and what is said of it: the values of the fair queue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from cola_runtime.job_choices import Priority
from cola_runtime.scheduler.packing import PaddedRow
from cola_runtime.types import Gang

Class = tuple[bool, Gang | None]
"""(train, gang): only microbatches of one class share a base step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """When a job should have ended, and from when on that is in danger; on the clock of who asks."""

    deadline: float
    latest_start: float  # the work that remains would just be done by the deadline, with some to spare

    def in_danger(self, now: float) -> bool:
        return now >= self.latest_start


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """One microbatch that could go into a base step now. It goes whole."""

    ticket: int  # order of arrival
    tenant_id: str
    job_id: str
    rows: int  # where they are not padded: as many as tokens (packing.measured)
    tokens: int  # of all rows, sources included, without padding
    padded: PaddedRow  # what each row costs, padded to the longest
    train: bool  # forward and backward, or forward only: the two never share a base step
    gang: Gang | None = None  # merged weights belong to one gang: a base step has one, or none
    priority: Priority = Priority.NORMAL
    due: Due | None = None

    def in_danger(self, now: float) -> bool:
        return self.due is not None and self.due.in_danger(now)

    @property
    def of_class(self) -> Class:
        return self.train, self.gang

    @property
    def padded_tokens(self) -> int:
        """What it costs in a base step of its own."""
        return self.rows * self.padded.total


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a tenant is entitled to."""

    weight: float = 1.0
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a waiting microbatch stands in the fair order."""

    tenants_ahead: int
    jobs_ahead: int  # of its own tenant
    due_ahead: int  # of these, those whose deadlines are in danger
    due: bool  # so is its own
    earlier_microbatches: int  # of its own job
    ready_at: float | None  # the tenant's tokens per minute are spent until then
    tokens_per_minute: int | None
    gang_first: Gang | None  # whose turn it is
    gang: Gang | None


def padded_tokens(chosen: Sequence[Waiting]) -> int:
    """What the base model computes for them: all rows as long as the longest, and so their sources."""
    padded = reduce(PaddedRow.beside, (waiting.padded for waiting in chosen))
    return padded.total * sum(waiting.rows for waiting in chosen)
