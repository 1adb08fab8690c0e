"""Keeps base steps in flight: takes what waits, lets the policy choose, runs it, hands the losses back.

One loop per base model. Two base steps are in flight, so that the base model starts the next one the
moment it ends the last; the second is sent when it is well filled or the first is about to end, since a
step sent early is a step packed badly.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from cola_runtime.config import SchedulerSettings
from cola_runtime.errors import ColaError, Unavailable
from cola_runtime.scheduler.packing import PaddedRow, padded_row
from cola_runtime.scheduler.policy import Share, Waiting, admit, charge, choose
from cola_runtime.scheduler.ports import BaseModelPort
from cola_runtime.types import BaseStep, BaseStepResult, Segment, SegmentLoss

logger = logging.getLogger(__name__)

FILLED_ENOUGH = 0.5  # share of the token budget at which the next base step is sent ahead
SEND_AHEAD_SECONDS = 0.02  # a part-filled step is sent this long before the running one should end


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """What one segment cost and gave."""

    loss: SegmentLoss
    base_seconds: float  # the segment's share of its base step, by padded tokens
    base_step: int


@dataclass(slots=True, kw_only=True)
class _Ticket:
    waiting: Waiting
    segment: Segment
    done: asyncio.Future[Computed]


@dataclass(slots=True, kw_only=True)
class _Flight:
    tickets: list[_Ticket]
    padded_tokens: int
    sent: float


class SchedulerLoop:
    """Owns the queue and the shares; `compute` is the only way into a base step."""

    def __init__(
        self, base: BaseModelPort, settings: SchedulerSettings, *, on_base_lost: Callable[[Exception], None]
    ) -> None:
        self._base = base
        self._settings = settings
        self._on_base_lost = on_base_lost
        self._queue: dict[int, _Ticket] = {}
        self._shares: dict[str, Share] = {}
        self._flights: dict[int, _Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._parked: set[str] = set()
        self._wake = asyncio.Event()
        self._tickets = itertools.count(1)
        self._numbers = itertools.count(1)
        self._seconds_per_token = 0.0
        self.busy_seconds = 0.0
        self.steps_done = 0

    @property
    def token_budget(self) -> int:
        return self._settings.token_budget

    async def compute(self, segment: Segment, *, tenant_id: str, train: bool) -> Computed:
        """Wait for a place in a base step and return the segment's loss. Cancelling gives the place back."""
        ticket = _Ticket(
            waiting=Waiting(
                ticket=next(self._tickets),
                tenant_id=tenant_id,
                job_id=segment.lease.job_id,
                rows=len(segment.rows),
                padded=padded_row(segment.rows),
                train=train,
                gang=segment.gang,
            ),
            segment=segment,
            done=asyncio.get_running_loop().create_future(),
        )
        self._shares = admit(self._shares, tenant_id, active=self._active_tenants())
        self._queue[ticket.waiting.ticket] = ticket
        self._wake.set()
        try:
            return await ticket.done
        finally:
            self._queue.pop(ticket.waiting.ticket, None)

    def charge(self, tenant_id: str, tokens: int) -> None:
        """Count what the base model computed for a tenant outside of base steps."""
        self._shares = charge(self._shares, {tenant_id: tokens})

    def park(self, device_id: str, *, parked: bool) -> None:
        """A device without credit: its tenants wait, nobody else does."""
        (self._parked.add if parked else self._parked.discard)(device_id)
        self._wake.set()

    def waiting_reason(self, job_id: str) -> str | None:
        """Why this job's microbatch is not in a base step; None when it has none waiting."""
        entry = next((t for t in self._queue.values() if t.waiting.job_id == job_id), None)
        if entry is None:
            return None
        busy = self._parked.intersection(entry.segment.lease.device_ids)
        if busy:
            return f"device {min(busy)} is still busy with earlier gradients"
        ahead = sum(1 for t in self._queue.values() if t.waiting.ticket < entry.waiting.ticket)
        return f"queued for a base step, {ahead} microbatches arrived earlier"

    async def run_forever(self) -> None:
        while True:
            timeout = self._send_when_due()
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), timeout)
            except TimeoutError:
                continue

    def _send_when_due(self) -> float | None:
        """Send what should be sent now; return after how many seconds to look again (None: when woken)."""
        while len(self._flights) < self._settings.base_steps_in_flight:
            chosen = self._choose()
            if not chosen:
                return None
            wait_seconds = self._hold_seconds(chosen)
            if wait_seconds > 0:
                return wait_seconds
            self._send(chosen)
        return None

    def _choose(self) -> list[_Ticket]:
        runnable = (
            t.waiting
            for t in self._queue.values()
            if not (t.waiting.train and self._parked.intersection(t.segment.lease.device_ids))
        )
        chosen = choose(runnable, shares=self._shares, token_budget=self._settings.token_budget)
        return [self._queue[entry.ticket] for entry in chosen]

    def _hold_seconds(self, chosen: list[_Ticket]) -> float:
        """How long a part-filled step should wait for company while another one runs."""
        if not self._flights or _padded_tokens(chosen) >= FILLED_ENOUGH * self._settings.token_budget:
            return 0.0
        running = self._flights[min(self._flights)]
        expected_end = running.sent + running.padded_tokens * self._seconds_per_token
        return expected_end - time.monotonic() - SEND_AHEAD_SECONDS

    def _send(self, tickets: list[_Ticket]) -> None:
        number = next(self._numbers)
        for ticket in tickets:
            del self._queue[ticket.waiting.ticket]
        self._flights[number] = _Flight(
            tickets=tickets, padded_tokens=_padded_tokens(tickets), sent=time.monotonic()
        )
        step = BaseStep(
            number=number,
            segments=tuple(ticket.segment for ticket in tickets),
            train=tickets[0].waiting.train,
        )
        task = asyncio.create_task(self._run(step), name=f"base-step-{number}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, step: BaseStep) -> None:
        try:
            result = await self._base.run(step)
        except Exception as error:
            logger.exception("base step failed", extra={"event": "base_step.failed", "number": step.number})
            self._fail(step.number, error)
        else:
            self._finish(result)
        finally:
            self._flights.pop(step.number, None)
            self._wake.set()

    def _finish(self, result: BaseStepResult) -> None:
        flight = self._flights[result.number]
        tokens: Counter[str] = Counter()
        for ticket in flight.tickets:
            tokens[ticket.waiting.tenant_id] += ticket.waiting.tokens
        self._shares = charge(self._shares, tokens)
        self.busy_seconds += result.seconds
        self.steps_done += 1
        self._seconds_per_token = result.seconds / max(1, result.computed_tokens)
        for ticket, loss in zip(flight.tickets, result.losses, strict=True):
            share = ticket.waiting.tokens / max(1, sum(tokens.values()))
            computed = Computed(loss=loss, base_seconds=result.seconds * share, base_step=result.number)
            if not ticket.done.done():
                ticket.done.set_result(computed)

    def _fail(self, number: int, error: Exception) -> None:
        cause = error if isinstance(error, ColaError) else Unavailable("BASE_MODEL_LOST", str(error))
        for ticket in self._flights[number].tickets:
            if not ticket.done.done():
                ticket.done.set_exception(cause)
        if isinstance(cause, Unavailable):
            self._on_base_lost(error)

    def _active_tenants(self) -> set[str]:
        flying = {t.waiting.tenant_id for flight in self._flights.values() for t in flight.tickets}
        return flying | {ticket.waiting.tenant_id for ticket in self._queue.values()}


def _padded_tokens(tickets: list[_Ticket]) -> int:
    padded = reduce(PaddedRow.beside, (ticket.waiting.padded for ticket in tickets))
    return padded.total * sum(ticket.waiting.rows for ticket in tickets)
