"""Keeps base steps in flight: takes what waits, lets the policy choose, runs it, hands the losses back.

One loop per base model replica. Two base steps are in flight, so that the base model starts the next one the
moment it ends the last; the second is sent when the first is about to end, a filled one a little earlier: a
step sent early is a step packed badly, and whoever comes back meanwhile waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from cola_runtime.config import SchedulerSettings
from cola_runtime.errors import ColaError, Unavailable
from cola_runtime.job_choices import Priority
from cola_runtime.rows import Row
from cola_runtime.scheduler.even_steps import EvenSteps
from cola_runtime.scheduler.packing import measured, split_rows
from cola_runtime.scheduler.policy import FairQueue
from cola_runtime.scheduler.ports import BaseModelPort
from cola_runtime.scheduler.tickets import Computed, Flight, Ticket
from cola_runtime.scheduler.waiting import Due, Share, Standing, Waiting, padded_tokens
from cola_runtime.trace.report import QUEUED
from cola_runtime.trace.spans import SpanRecorder
from cola_runtime.types import BankUse, BaseStep, BaseStepResult, Segment

logger = logging.getLogger(__name__)

FILLED_ENOUGH = 0.5  # share of the token budget at which a base step counts as filled
FILLED_AHEAD = 0.25  # share of the running one's time by which a filled step is sent ahead
SEND_AHEAD_SECONDS = 0.02  # a part-filled step is sent this long before the running one should end
LEAST_HOLD_SECONDS = 0.001  # less is not worth a timer
MOST_AHEAD = 4.0  # token budgets that other replicas' work may put a tenant behind here


class SchedulerLoop:
    """Owns the fair queue; `compute` is the only way into a base step. Its clock is the event loop's."""

    def __init__(
        self,
        base: BaseModelPort,
        settings: SchedulerSettings,
        *,
        on_base_lost: Callable[[Exception], None],
        unpadded: bool = False,
        bank_bytes: int | None = None,
        spans: SpanRecorder | None = None,
    ) -> None:
        """`unpadded`: the base model computes about as many tokens as the rows have. `bank_bytes`:
        of adapters' weights that it can have on its device at a time.
        """
        self._bank_bytes = bank_bytes
        self._adapter_bytes: dict[str, int] = {}  # by job
        self.bank = BankUse()
        self._spans = spans or SpanRecorder()
        self._base = base
        self._unpadded = unpadded
        self._settings = settings
        self._on_base_lost = on_base_lost
        self._queue = FairQueue()
        self._tickets: dict[int, Ticket] = {}
        self._of_job: dict[str, dict[int, Ticket]] = {}
        self._of_device: dict[str, dict[int, Ticket]] = {}  # those that train
        self._flights: dict[int, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._parked: set[str] = set()
        self._wake = asyncio.Event()
        self._peers: tuple[SchedulerLoop, ...] = ()
        self._ticket_numbers = itertools.count(1)
        self._step_numbers = itertools.count(1)
        self._even_steps = EvenSteps()
        self.busy_seconds = 0.0
        self.steps_done = 0
        self.tokens_done = 0  # without padding

    @property
    def token_budget(self) -> int:
        return self._settings.token_budget

    def parts(self, rows: Sequence[Row]) -> list[tuple[Row, ...]]:
        """Cut what is above a base step's token budget."""
        return split_rows(rows, token_budget=self.token_budget, unpadded=self._unpadded)

    def share_counters(self, peers: Sequence[SchedulerLoop]) -> None:
        """What is computed for a tenant here counts in these loops too, which are of other replicas."""
        self._peers = tuple(peers)

    def note_adapter(self, job_id: str, limited_bytes: int) -> None:
        """What the job's adapter takes of `bank_bytes`, until `forget_adapter`."""
        self._adapter_bytes[job_id] = limited_bytes

    def forget_adapter(self, job_id: str) -> None:
        self._adapter_bytes.pop(job_id, None)
        self._even_steps.forget(job_id)

    def set_share(self, tenant_id: str, share: Share) -> None:
        """From the tenant's next tokens on."""
        self._queue.set_share(tenant_id, share)
        self._wake.set()

    async def compute(
        self,
        segment: Segment,
        *,
        tenant_id: str,
        train: bool,
        priority: Priority = Priority.NORMAL,
        due: Due | None = None,
    ) -> Computed:
        """Wait for a place in a base step and return the segment's loss. Cancelling gives the place back."""
        rows, padded = measured(segment.rows, unpadded=self._unpadded)
        waiting = Waiting(
            ticket=next(self._ticket_numbers),
            tenant_id=tenant_id,
            job_id=segment.lease.job_id,
            rows=rows,
            tokens=segment.tokens,
            padded=padded,
            train=train,
            gang=segment.gang,
            priority=priority,
            due=due,
        )
        done: asyncio.Future[Computed] = asyncio.get_running_loop().create_future()
        ticket = Ticket(waiting=waiting, segment=segment, done=done, asked=time.monotonic())
        self._keep(ticket)
        if _dealt_out(waiting):
            self._even_steps.waits(waiting.job_id, waiting.padded_tokens, now=_now())
        self._queue_up(ticket)
        self._wake.set()
        try:
            return await ticket.done
        finally:
            self._queue.remove(ticket.number, now=_now())
            if not ticket.sent:
                self._stops_waiting(ticket, computed=False)
            self._forget(ticket)

    def base_seconds(self, tokens: int) -> float:
        """Of so many tokens, as the base steps so far took; 0 before the first."""
        return tokens * self.busy_seconds / max(1, self.tokens_done)

    def charge(self, tenant_id: str, tokens: int) -> None:
        """Count what the base model computed for a tenant outside of base steps."""
        self._queue.charge(tenant_id, tokens, now=_now())
        self._tell_peers(tenant_id, tokens)
        self._wake.set()

    def charge_elsewhere(self, tenant_id: str, tokens: int) -> None:
        """Count what another replica of the base model computed for a tenant.

        The loop is not woken: nobody may go sooner for it, and every replica would decide anew whenever any
        one of them sends a base step.
        """
        most_ahead = MOST_AHEAD * self.token_budget
        self._queue.charge(tenant_id, tokens, now=_now(), most_ahead=most_ahead)

    def park(self, device_id: str, *, parked: bool) -> None:
        """A device without credit: its tenants wait, nobody else does."""
        (self._parked.add if parked else self._parked.discard)(device_id)
        for ticket in self._of_device.get(device_id, {}).values():
            if parked:
                self._queue.remove(ticket.number, now=_now())
            elif not ticket.sent and ticket.number not in self._queue:
                self._queue_up(ticket)
        self._wake.set()

    def waiting_reason(self, job_id: str) -> str | None:
        """Why this job's oldest microbatch is not in a base step; None when it has none waiting."""
        ticket = next((t for t in self._of_job.get(job_id, {}).values() if not t.sent), None)
        if ticket is None:
            return None
        busy = self._parked.intersection(ticket.device_ids)
        if busy:
            return f"device {min(busy)} is still busy with earlier gradients"
        return _said(self._queue.standing(ticket.number), now=_now())

    def computes(self, job_id: str) -> bool:
        """A microbatch of the job is in a base step that was sent."""
        tickets = self._of_job.get(job_id, {}).values()
        return any(ticket.sent for ticket in tickets)

    async def run_forever(self) -> None:
        while True:
            timeout = self._send_when_due()
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):  # wait_for may swallow a cancellation (Python 3.11)
                    await self._wake.wait()

    def _send_when_due(self) -> float | None:
        """Send what should be sent now; return after how many seconds to look again (None: when woken)."""
        while len(self._flights) < self._settings.base_steps_in_flight:
            chosen = self._within_bank(self._choose(now=_now()))
            if not chosen:
                ready_at = self._queue.next_ready()
                return None if ready_at is None else max(0.0, ready_at - _now())
            wait_seconds = self._hold_seconds(padded_tokens(chosen))
            if wait_seconds > LEAST_HOLD_SECONDS:
                return wait_seconds
            self._send(chosen)
        return None

    def _choose(self, *, now: float) -> Sequence[Waiting]:
        room = self._even_steps.room(now=now)
        return self._queue.choose(token_budget=self.token_budget, room=room, now=now)

    def _within_bank(self, chosen: Sequence[Waiting]) -> Sequence[Waiting]:
        """Those whose adapters are on the base model's device together. The first always goes."""
        if self._bank_bytes is None:
            return chosen
        room, jobs = self._bank_bytes, set[str]()
        kept: list[Waiting] = []
        for waiting in chosen:
            needed = 0 if waiting.job_id in jobs else self._adapter_bytes.get(waiting.job_id, 0)
            if needed <= room or not kept:
                room -= needed
                jobs.add(waiting.job_id)
                kept.append(waiting)
        return kept

    def _hold_seconds(self, tokens: int) -> float:
        """How long a step should wait, while another one runs, for company and for who is owed more."""
        if not self._flights:
            return 0.0
        running = self._flights[min(self._flights)]
        expected_seconds = self._even_steps.times.of(running.padded_tokens)
        filled = tokens >= FILLED_ENOUGH * self.token_budget
        ahead = max(FILLED_AHEAD * expected_seconds if filled else 0.0, SEND_AHEAD_SECONDS)
        return running.started + expected_seconds - ahead - _now()

    def _send(self, chosen: Sequence[Waiting]) -> None:
        number, now = next(self._step_numbers), _now()
        self._queue.take(chosen, now=now)
        tickets = [self._tickets[waiting.ticket] for waiting in chosen]
        tokens = Counter[str]()
        for ticket in tickets:
            ticket.sent = True
            self._stops_waiting(ticket, computed=True)
            tokens[ticket.waiting.tenant_id] += ticket.waiting.tokens
            self._record_queued(ticket, number)
        for tenant_id, count in tokens.items():
            self._tell_peers(tenant_id, count)
        self._flights[number] = Flight(tickets=tickets, padded_tokens=padded_tokens(chosen), started=now)
        step = BaseStep(
            number=number,
            segments=tuple(ticket.segment for ticket in tickets),
            train=chosen[0].train,
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
            if self._flights:
                self._flights[min(self._flights)].started = _now()
            self._wake.set()

    def _finish(self, result: BaseStepResult) -> None:
        flight = self._flights[result.number]
        self.busy_seconds += result.seconds
        self.steps_done += 1
        self.tokens_done += result.real_tokens
        self.bank = result.bank
        self._even_steps.times.add(result.computed_tokens, result.seconds)
        tokens = [
            0 if loss.reason else ticket.waiting.tokens  # a refused segment was not computed
            for ticket, loss in zip(flight.tickets, result.losses, strict=True)
        ]
        for ticket, loss, own in zip(flight.tickets, result.losses, tokens, strict=True):
            seconds = result.seconds * own / max(1, sum(tokens))
            computed = Computed(loss=loss, base_seconds=seconds, base_step=result.number)
            self._ends(ticket, away=True)
            if not ticket.done.done():
                ticket.done.set_result(computed)

    def _fail(self, number: int, error: Exception) -> None:
        cause = error if isinstance(error, ColaError) else Unavailable("BASE_MODEL_LOST", str(error))
        for ticket in self._flights[number].tickets:
            self._ends(ticket, away=False)
            if not ticket.done.done():
                ticket.done.set_exception(cause)
        if isinstance(cause, Unavailable):
            self._on_base_lost(error)

    def _record_queued(self, ticket: Ticket, number: int) -> None:
        if self._spans.on:
            job_id, tokens = ticket.waiting.job_id, ticket.waiting.tokens
            lane, now = f"queue of {job_id}", time.monotonic()
            self._spans.add(lane, QUEUED, begin=ticket.asked, end=now, base_step=number, tokens=tokens)

    def _tell_peers(self, tenant_id: str, tokens: int) -> None:
        for peer in self._peers:
            peer.charge_elsewhere(tenant_id, tokens)

    def _stops_waiting(self, ticket: Ticket, *, computed: bool) -> None:
        waiting = ticket.waiting
        if _dealt_out(waiting):
            self._even_steps.stops_waiting(waiting.job_id, waiting.padded_tokens, computed=computed)

    def _ends(self, ticket: Ticket, *, away: bool) -> None:
        waiting = ticket.waiting
        if _dealt_out(waiting):
            self._even_steps.ends(waiting.job_id, waiting.padded_tokens, now=_now(), away=away)

    def _queue_up(self, ticket: Ticket) -> None:
        if not self._parked.intersection(ticket.device_ids):
            self._queue.add(ticket.waiting, now=_now())

    def _keep(self, ticket: Ticket) -> None:
        self._tickets[ticket.number] = ticket
        for index, name in self._indexes(ticket):
            index.setdefault(name, {})[ticket.number] = ticket

    def _forget(self, ticket: Ticket) -> None:
        del self._tickets[ticket.number]
        for index, name in self._indexes(ticket):
            del index[name][ticket.number]
            if not index[name]:
                del index[name]

    def _indexes(self, ticket: Ticket) -> list[tuple[dict[str, dict[int, Ticket]], str]]:
        """Where the ticket is found by name: its job's, and each of its devices'."""
        return [
            (self._of_job, ticket.waiting.job_id),
            *((self._of_device, device_id) for device_id in ticket.device_ids),
        ]


def _dealt_out(waiting: Waiting) -> bool:
    """Whether it goes into even steps: what trains, but for gangs, whose weights are merged for each step."""
    return waiting.train and waiting.gang is None


def _now() -> float:
    return asyncio.get_running_loop().time()


def _said(standing: Standing, *, now: float) -> str:
    """For the tenant, who learns nothing of other tenants but how many are before it."""
    if standing.ready_at is not None:
        return (
            f"its tenant's {standing.tokens_per_minute} tokens per minute are spent; "
            f"it may go on in {max(0.0, standing.ready_at - now):.1f} s"
        )
    before = [
        f"{count} {noun}{'' if count == 1 else 's'} before it"
        for count, noun in (
            (standing.tenants_ahead, "tenant"),
            (standing.jobs_ahead, "job of its tenant"),
            (standing.earlier_microbatches, "microbatch of its own"),
        )
        if count
    ]
    place = ", ".join(before) or "next in the fair order"
    if standing.due:
        place += "; its deadline is in danger, so it goes before its tenant's other jobs"
    elif standing.due_ahead:
        place += f"; {standing.due_ahead} of the jobs before it because their deadlines are in danger"
    turn = "; the next base step is of other merged weights" if standing.gang_first != standing.gang else ""
    return f"queued for a base step: {place}{turn}"
