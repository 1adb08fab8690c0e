"""The replicas of one base model: which of them computes which job's rows, and which of them answer.

The rule of placement is that of devices (`placement.py`), with the tokens of a job's step for the size of
its adapter: a replica's round is one step of every job that is there. A job stays where it is until its
replica is lost, or until `rebalance` moves it at a step boundary. The jobs of a group that is merged into one
set of weights are together, and are never moved. docs/scheduling.md states the rules.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from cola_runtime.errors import ColaError
from cola_runtime.jobs.plan import TrainingPlan
from cola_runtime.scheduler.leases import LeaseBook
from cola_runtime.scheduler.loop import SchedulerLoop
from cola_runtime.scheduler.placement import Demand, Move, Offer, place, rebalance
from cola_runtime.scheduler.ports import BaseModelPort, FaultListener, nobody_hears
from cola_runtime.scheduler.waiting import Share
from cola_runtime.transport.handshake import TICKET_SECONDS
from cola_runtime.types import BaseEvent, BaseModelDescription, DeviceLinkChanged, StepApplied, StepRefused

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
DISMISS_SECONDS = 5.0  # a replica that hangs must not keep a device's other streams open


def replica_name(base_model: str, number: int) -> str:
    return f"{base_model}/{number}"


def lost_replica_reporter(book: LeaseBook, replica: str) -> Callable[[Exception], None]:
    """For a scheduler loop: a base step that failed for lack of its replica loses the leases there."""

    def report(error: Exception) -> None:
        book.lose_replica(replica, reason="BASE_MODEL_LOST", message=str(error))

    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """What is known of a replica; what was computed counts from the service's start."""

    replica: str
    base_model: str
    state: str  # "ready" or "lost"
    jobs: int
    base_busy_seconds: float
    base_steps: int
    tokens: int  # that they computed, without padding
    bank_hits: int  # of its bank under a byte limit, since its process started, as what follows
    bank_misses: int
    bank_evicted_bytes: int
    bank_resident_bytes: int


@dataclass(slots=True, kw_only=True, eq=False)
class Replica:
    """One process that computes base steps, with the loop that fills them."""

    name: str
    base: BaseModelPort
    loop: SchedulerLoop
    description: BaseModelDescription  # as it last described itself
    ready: bool = True


@dataclass(slots=True, kw_only=True)
class _Resident:
    """A job that has a replica."""

    replica: str
    demand: Demand
    group: str | None  # of jobs that are merged together


@dataclass(slots=True)
class Residents:
    """Which job is where. Pure: no clock, no I/O."""

    _jobs: dict[str, _Resident] = field(default_factory=dict)

    def of(self, job_id: str) -> str | None:
        resident = self._jobs.get(job_id)
        return None if resident is None else resident.replica

    def at(self, replica: str) -> list[str]:
        return [job_id for job_id, resident in self._jobs.items() if resident.replica == replica]

    def place(self, job_id: str, plan: TrainingPlan, ready: Sequence[str]) -> str | None:
        """Where the job's rows are computed from now on; None if no replica is ready.

        Where it is already, if that is ready; else where its group is; else where the round would be shortest
        with it. Equal rounds: the replica with fewer jobs, then the first.
        """
        if self.of(job_id) in ready:
            return self.of(job_id)
        group = None if plan.collaboration is None else plan.collaboration.group
        demand = Demand(numbers=max(1, round(plan.step_tokens)), memory_bytes=0)
        together = [
            each.replica
            for each in self._jobs.values()
            if group is not None and each.group == group and each.replica in ready
        ]
        found = together[:1] or place(job_id, demand, self._offers(ready), 1)
        if not found:
            return None
        self._jobs[job_id] = _Resident(replica=found[0], demand=demand, group=group)
        return found[0]

    def leave(self, job_id: str) -> None:
        self._jobs.pop(job_id, None)

    def rebalance(self, ready: Sequence[str], movable: Collection[str]) -> list[Move]:
        """All moves that are worth it, one after the other; those jobs are at their targets from now on."""
        alone = frozenset(job_id for job_id in movable if self._jobs[job_id].group is None)
        moves: list[Move] = []
        while (move := rebalance(self._offers(ready), alone)) is not None:
            self._jobs[move.job_id].replica = move.target
            moves.append(move)
        return moves

    def _offers(self, ready: Sequence[str]) -> list[Offer]:
        return [
            Offer(device_id=name, order=order, speed=1.0, memory_bytes=0, jobs=self._demands(name))
            for order, name in enumerate(ready)
        ]

    def _demands(self, replica: str) -> Mapping[str, Demand]:
        return {job_id: self._jobs[job_id].demand for job_id in self.at(replica)}


class ReplicaSet:
    """Owns the scheduler loops of one base model, which share the tenants' counters."""

    def __init__(self, replicas: Sequence[Replica], *, book: LeaseBook, rebalance_seconds: float) -> None:
        self._replicas = {replica.name: replica for replica in replicas}
        self._book = book
        self._rebalance_seconds = rebalance_seconds
        self._residents = Residents()
        self._came_back = asyncio.Condition()
        self._dismissed: dict[str, float] = {}  # when; as long as tickets from before could be valid
        self.on_fault: FaultListener = nobody_hears
        for replica in replicas:
            replica.loop.share_counters([other.loop for other in replicas if other is not replica])

    @property
    def all(self) -> tuple[Replica, ...]:
        return tuple(self._replicas.values())

    @property
    def description(self) -> BaseModelDescription:
        """Of the first; the others differ in their endpoints only."""
        return self.all[0].description

    @property
    def ready(self) -> list[str]:
        return [replica.name for replica in self.all if replica.ready]

    def of(self, job_id: str) -> Replica | None:
        """Where the job's rows are computed; None before its first lease."""
        name = self._residents.of(job_id)
        return None if name is None else self._replicas[name]

    def place(self, job_id: str, plan: TrainingPlan) -> Replica | None:
        """Where the job leases now (`Residents.place`); None if no replica answers."""
        name = self._residents.place(job_id, plan, self.ready)
        return None if name is None else self._replicas[name]

    def named(self, name: str) -> Replica:
        """The first one, if there is none of this name now."""
        return self._replicas.get(name, self.all[0])

    def leave(self, job_id: str) -> None:
        """The job has ended, or waits for its tenant."""
        self._residents.leave(job_id)

    async def dismiss(self, device_id: str) -> None:
        """End the device's gradient stream at every replica; tickets from before open none, at none."""
        now = time.monotonic()
        lately = {name: at for name, at in self._dismissed.items() if now - at <= TICKET_SECONDS}
        self._dismissed = {**lately, device_id: now}
        await asyncio.gather(*(self._dismiss_at(replica, device_id) for replica in self.all))

    async def _dismiss_at(self, replica: Replica, device_id: str) -> None:
        try:
            async with asyncio.timeout(DISMISS_SECONDS):
                await replica.base.dismiss_device(device_id)
        except (
            ColaError,
            TimeoutError,
        ) as error:  # a lost replica has no stream, and is told when it is back
            logger.warning("%s not told: %s", replica.name, error, extra={"event": "device.end_undelivered"})

    async def wait_ready(self) -> None:
        """Return when a replica answers."""
        async with self._came_back:
            await self._came_back.wait_for(lambda: self.ready)

    def to_ask(self, job_id: str | None) -> Replica:
        """Who generates: the job's replica, else the one with the fewest jobs of those that answer."""
        own = None if job_id is None else self.of(job_id)
        if own is not None:
            return own
        ready = [replica for replica in self.all if replica.ready] or self.all
        return min(ready, key=lambda replica: len(self._residents.at(replica.name)))

    def base_seconds(self, tokens: int) -> float:
        """Of so many tokens, as the base steps so far took; 0 before the first."""
        return tokens * (self.seconds_per_token or 0.0)

    @property
    def seconds_per_token(self) -> float | None:
        """Of the base steps so far; None before the first."""
        loops = [replica.loop for replica in self.all]
        tokens = sum(loop.tokens_done for loop in loops)
        return sum(loop.busy_seconds for loop in loops) / tokens if tokens else None

    def set_share(self, tenant_id: str, share: Share) -> None:
        for replica in self.all:
            replica.loop.set_share(tenant_id, share)

    def statuses(self) -> list[ReplicaStatus]:
        return [
            ReplicaStatus(
                replica=replica.name,
                base_model=replica.description.name,
                state="ready" if replica.ready else "lost",
                jobs=len(self._residents.at(replica.name)),
                base_busy_seconds=replica.loop.busy_seconds,
                base_steps=replica.loop.steps_done,
                tokens=replica.loop.tokens_done,
                bank_hits=replica.loop.bank.hits,
                bank_misses=replica.loop.bank.misses,
                bank_evicted_bytes=replica.loop.bank.evicted_bytes,
                bank_resident_bytes=replica.loop.bank.resident_bytes,
            )
            for replica in self.all
        ]

    async def run_forever(self) -> None:
        """Fill base steps, hear what every replica reports, and keep their rounds even."""
        async with asyncio.TaskGroup() as group:
            for replica in self.all:
                group.create_task(replica.loop.run_forever(), name=f"scheduler of {replica.name}")
                group.create_task(self._hear_forever(replica), name=f"events of {replica.name}")
            group.create_task(self._balance_forever(), name="replica balance")

    async def _balance_forever(self) -> None:
        while True:
            await asyncio.sleep(self._rebalance_seconds)
            self._balance()

    def _balance(self) -> None:
        leases = {
            job_id: lease
            for replica in self.all
            for job_id in self._residents.at(replica.name)
            if (lease := self._book.current(job_id)) is not None and not self._book.move_asked(lease)
        }
        for move in self._residents.rebalance(self.ready, leases.keys()):
            why = f"from base model replica {move.source}, which has more to do, to {move.target}"
            self._book.ask_move(leases[move.job_id], why)

    async def _hear_forever(self, replica: Replica) -> None:
        after = 0
        while True:
            try:
                after, events = await replica.base.next_events(after)
            except Exception as error:
                logger.warning("events of %s: %s", replica.name, error, extra={"event": "base.events_lost"})
                await self._recover(replica)
                after = 0
                continue
            for event in events:
                self._hear(replica, event)

    def _hear(self, replica: Replica, event: BaseEvent) -> None:
        if isinstance(event, StepApplied):
            self._book.applied(event)
        elif isinstance(event, StepRefused):
            self._book.lose(event.lease, reason=event.reason, message=event.message)
            if not event.lease.further_device_ids:  # of several devices nobody knows which it was
                self.on_fault(event.lease.device_id, event.reason)
        elif isinstance(event, DeviceLinkChanged):
            replica.loop.park(event.device_id, parked=event.parked and event.connected)
            if not event.connected:
                self.on_fault(event.device_id, event.fault)
                self._book.lose_link(
                    event.device_id,
                    replica=replica.name,
                    reason="DEVICE_LINK_LOST",
                    message=f"{event.device_id} left the base model",
                )

    async def _recover(self, replica: Replica) -> None:
        """The replica's actor died: nothing of it is needed. Its jobs go to the others at once.

        It is back when it describes itself, which starts its gradient server.
        """
        replica.ready = False
        for job_id in self._residents.at(replica.name):
            self._residents.leave(job_id)
        self._book.lose_replica(
            replica.name, reason="BASE_MODEL_LOST", message=f"base model replica {replica.name} stopped"
        )
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            try:
                replica.description = await replica.base.describe()
                for device_id in list(self._dismissed):  # a new process knows of none
                    await replica.base.dismiss_device(device_id)
                break
            except Exception as error:
                logger.warning("%s not back yet: %s", replica.name, error, extra={"event": "base.waiting"})
        async with self._came_back:
            replica.ready = True
            self._came_back.notify_all()
        self._balance()
