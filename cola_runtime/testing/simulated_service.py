"""A service of many replicas and devices as discrete events around the real fair queues.

What is real and what is modelled is stated in benchmarks/simulate.py, which prints what this measures.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cola_runtime.scheduler.loop import MOST_AHEAD
from cola_runtime.scheduler.policy import FairQueue
from cola_runtime.scheduler.waiting import Share, Waiting, padded_tokens
from cola_runtime.testing.backlogs import Backlogs
from cola_runtime.testing.modelled import STEP_SECONDS, TOKEN_SECONDS
from cola_runtime.testing.simulated_jobs import SIZES, TOKEN_BUDGET, Job, Part, draw_jobs, weight_of

DEVICE_SECONDS = 0.048  # adapter_gradient taps of SmolLM2 (wire)
REPLICA_FAILURES_PER_HOUR = 1 / (30 * 24)
DEVICE_FAILURES_PER_HOUR = 1 / (7 * 24)
REPLICA_BACK_SECONDS = 60.0
LEASE_SECONDS = 2.0  # until a job that lost its replica goes on at another one
DEVICE_BACK_SECONDS = 30.0
CHECKPOINT_EVERY = 10
WINDOW_SECONDS = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    tenants: int
    jobs: int
    replicas: int
    devices: int
    load: float  # offered while jobs arrive, of what the replicas compute
    failures: float = 1.0  # times the rates above


@dataclass(slots=True)
class Replica:
    queue: FairQueue = field(default_factory=FairQueue)
    jobs: set[int] = field(default_factory=set)
    busy: bool = False
    gone_until: float = 0.0
    life: int = 0  # grows with each failure, so that the end of a lost base step is known
    busy_seconds: float = 0.0


@dataclass(slots=True)
class Measured:
    queue_seconds: dict[str, list[float]] = field(default_factory=lambda: {size: [] for size in SIZES})
    decisions: int = 0
    microbatches: int = 0
    decision_seconds: float = 0.0  # CPU: choosing and charging
    telling_seconds: float = 0.0  # CPU: charging at all other replicas
    real_tokens: int = 0
    computed_tokens: int = 0
    steps_done: int = 0
    steps_repeated: int = 0
    jobs_done: int = 0
    failures: int = 0


class Simulation:
    """`run` plays the events in order of time; nothing else knows the time."""

    def __init__(self, scale: Scale, seed: int) -> None:
        self._scale, self._random = scale, random.Random(seed)  # noqa: S311 (no secret)
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._order, self._tickets = itertools.count(), itertools.count()
        self._replicas = [Replica() for _ in range(scale.replicas)]
        self._rounds = [0] * scale.replicas  # tokens of one step of every job that is there
        self._device_free = [0.0] * scale.devices
        self._of_device: list[set[int]] = [set() for _ in range(scale.devices)]
        self._under_way: dict[int, tuple[Job, int, Part]] = {}  # by ticket, with the job's life then
        self._jobs: list[Job] = []
        self.now = self.arrival_seconds = 0.0
        self.measured = Measured()
        self.backlogs = Backlogs([weight_of(tenant) for tenant in range(scale.tenants)])

    def run(self) -> Measured:
        """While jobs arrive."""
        self._jobs = draw_jobs(
            self._random, tenants=self._scale.tenants, jobs=self._scale.jobs, devices=self._scale.devices
        )
        work_seconds = sum(job.steps * job.padded_tokens for job in self._jobs) * TOKEN_SECONDS
        self.arrival_seconds = work_seconds / self._scale.replicas / self._scale.load
        for job in self._jobs:
            self._at(self._random.uniform(0, self.arrival_seconds), self._start, job)
        for replica in range(self._scale.replicas):
            self._at(self._until_failure(REPLICA_FAILURES_PER_HOUR), self._fail_replica, replica)
        for device in range(self._scale.devices):
            self._at(self._until_failure(DEVICE_FAILURES_PER_HOUR), self._fail_device, device)
        self._at(WINDOW_SECONDS, self._end_window)
        events, last = self._events, self.arrival_seconds
        while events[0][0] <= last:
            self.now, _, happen, arguments = heapq.heappop(events)
            happen(*arguments)
        return self.measured

    @property
    def replicas(self) -> int:
        return len(self._replicas)

    @property
    def utilisation(self) -> float:
        busy = sum(replica.busy_seconds for replica in self._replicas)
        return busy / (self._scale.replicas * self.arrival_seconds)

    def _at(self, when: float, happen: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self._events, (when, next(self._order), happen, arguments))

    def _end_window(self) -> None:
        self.backlogs.end_window(self.now)
        self._at(self.now + WINDOW_SECONDS, self._end_window)

    # A job's life

    def _start(self, job: Job) -> None:
        self._of_device[job.device].add(job.number)
        self._lease(job, 0)

    def _lease(self, job: Job, life: int) -> None:
        """At the replica whose round is shortest, of those that answer."""
        if job.life != life:
            return
        rounds = self._rounds
        ready = [n for n, replica in enumerate(self._replicas) if replica.gone_until <= self.now]
        number = min(ready or range(len(rounds)), key=rounds.__getitem__)
        replica, job.replica = self._replicas[number], number
        replica.jobs.add(job.number)
        replica.queue.set_share(job.tenant_id, Share(weight=weight_of(job.tenant)))
        rounds[number] += job.step_tokens
        self._ask(job)

    def _ask(self, job: Job) -> None:
        """For the next step: all its parts wait, the last of which ends it."""
        job.asked, job.left = self.now, len(job.parts)
        queue = self._replicas[job.replica].queue
        for part in job.parts:
            ticket = next(self._tickets)
            waiting = Waiting(
                ticket=ticket,
                tenant_id=job.tenant_id,
                job_id=job.job_id,
                rows=part.rows,
                tokens=part.tokens,
                padded=job.padded,
                train=True,
            )
            self._under_way[ticket] = job, job.life, part
            job.waiting.add(ticket)
            self.backlogs.wait(job.tenant, self.now)
            queue.add(waiting, now=self.now)
        self._decide(job.replica)

    def _decide(self, number: int) -> None:
        replica = self._replicas[number]
        if replica.busy or replica.gone_until > self.now or not len(replica.queue):
            return
        started = time.thread_time()
        chosen = replica.queue.choose(token_budget=TOKEN_BUDGET, now=self.now)
        replica.queue.take(chosen, now=self.now)
        decided = time.thread_time()
        self._tell_others(replica, chosen)
        self.measured.telling_seconds += time.thread_time() - decided
        self.measured.decision_seconds += decided - started
        self.measured.decisions += 1
        self.measured.microbatches += len(chosen)
        for waiting in chosen:
            job = self._under_way[waiting.ticket][0]
            job.waiting.remove(waiting.ticket)
            self.backlogs.leave(job.tenant)
        padded = padded_tokens(chosen)
        seconds = STEP_SECONDS + TOKEN_SECONDS * padded
        replica.busy = True
        self._at(self.now + seconds, self._end, number, replica.life, chosen, padded, seconds)

    def _tell_others(self, replica: Replica, chosen: tuple[Waiting, ...]) -> None:
        """What the loops of a base model's replicas tell each other (`SchedulerLoop.share_counters`)."""
        tokens: dict[str, int] = {}
        for waiting in chosen:
            tokens[waiting.tenant_id] = tokens.get(waiting.tenant_id, 0) + waiting.tokens
        others = [other.queue for other in self._replicas if other is not replica]
        for tenant_id, count in tokens.items():
            for queue in others:
                queue.charge(tenant_id, count, now=self.now, most_ahead=MOST_AHEAD * TOKEN_BUDGET)

    def _end(self, number: int, life: int, chosen: tuple[Waiting, ...], padded: int, seconds: float) -> None:
        replica, measured = self._replicas[number], self.measured
        under_way = [self._under_way.pop(waiting.ticket) for waiting in chosen]
        if replica.life != life:
            return  # its jobs have begun anew
        replica.busy = False
        replica.busy_seconds += seconds
        measured.computed_tokens += padded
        for job, job_life, part in under_way:
            measured.real_tokens += part.tokens
            self.backlogs.serve(job.tenant, part.tokens)
            if job.life == job_life:
                job.left -= 1
                if not job.left:
                    self._train(job)
        self._decide(number)

    def _train(self, job: Job) -> None:
        """The base model is done with the step; the device applies it when it is free."""
        self.measured.queue_seconds[job.size].append(self.now - job.asked)
        ready = max(self.now, self._device_free[job.device]) + DEVICE_SECONDS
        self._device_free[job.device] = ready
        self._at(ready, self._applied, job, job.life)

    def _applied(self, job: Job, life: int) -> None:
        if job.life != life:
            return
        job.done += 1
        self.measured.steps_done += 1
        if job.done < job.steps:
            self._ask(job)
            return
        self.measured.jobs_done += 1
        self._leave(job)
        self._of_device[job.device].discard(job.number)

    # Failures

    def _until_failure(self, per_hour: float) -> float:
        """The time of a machine's next one."""
        return self.now + self._random.expovariate(per_hour * self._scale.failures / 3600)

    def _fail_replica(self, number: int) -> None:
        replica = self._replicas[number]
        self.measured.failures += 1
        replica.life, replica.busy = replica.life + 1, False
        replica.gone_until = self.now + REPLICA_BACK_SECONDS
        for job in sorted(replica.jobs):
            self._begin_anew(self._jobs[job], LEASE_SECONDS)
        self._at(replica.gone_until, self._decide, number)
        self._at(self._until_failure(REPLICA_FAILURES_PER_HOUR), self._fail_replica, number)

    def _fail_device(self, device: int) -> None:
        self.measured.failures += 1
        jobs, self._of_device[device] = self._of_device[device], set()
        for number in sorted(jobs):
            job = self._jobs[number]
            job.device = self._random.randrange(self._scale.devices)
            self._of_device[job.device].add(number)
            self._begin_anew(job, DEVICE_BACK_SECONDS)
        self._at(self._until_failure(DEVICE_FAILURES_PER_HOUR), self._fail_device, device)

    def _begin_anew(self, job: Job, seconds: float) -> None:
        """From the newest checkpoint, in so many seconds, under a new lease."""
        self._leave(job)
        job.life += 1
        repeated = job.done % CHECKPOINT_EVERY
        job.done -= repeated
        self.measured.steps_repeated += repeated
        self._at(self.now + seconds, self._lease, job, job.life)

    def _leave(self, job: Job) -> None:
        """Its replica; nothing of it waits there any more."""
        if job.replica < 0:
            return
        replica = self._replicas[job.replica]
        for ticket in job.waiting:
            replica.queue.remove(ticket, now=self.now)
            self.backlogs.leave(job.tenant)
            del self._under_way[ticket]
        job.waiting.clear()
        replica.jobs.discard(job.number)
        self._rounds[job.replica] -= job.step_tokens
        job.replica = -1
