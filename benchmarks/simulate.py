"""A service of 64 replicas, 2,000 devices, 10,000 tenants and 100,000 jobs, simulated around the real policy.

    python benchmarks/simulate.py [--quick] [--json] [--seed N]

Discrete events. Real: the fair queue (one per replica, cola_runtime/scheduler/policy.py) with its packing,
charging and bounds. Modelled, from the figures in benchmarks/README.md: a base step takes STEP_SECONDS +
TOKEN_SECONDS per padded token; a device needs DEVICE_SECONDS per step, one at a time. Assumed: jobs arrive
at random at 95 % of what the replicas can compute; tenants' numbers of jobs follow Zipf's law, steps and rows
per step of a job are heavy-tailed (Pareto); a job's rows are all near one length drawn for it (log-normal),
so that a microbatch has little padding of its own; one above the token budget goes in parts, one after the
other; a job sticks to the replica with the fewest jobs and to a device drawn at random.

Failures: a replica is gone for 60 s and then goes on with what waited; the base step that it ran is lost. A
device is gone for good; its jobs go on after 30 s with another one, and repeat half of the ten steps between
two checkpoints. Rates are per hour of one machine: once, then 100 and 1,000 times that.

Prints utilisation of the replicas while jobs arrive, queue time (arrival of a microbatch to the end of its
base step) by size of tenant, and what a decision costs here: one coordinator saturates where decisions per
second times that reach 1.
"""

from __future__ import annotations

import heapq
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from cola_runtime.scheduler.packing import PaddedRow
from cola_runtime.scheduler.policy import FairQueue
from cola_runtime.scheduler.waiting import Waiting, padded_tokens
from cola_runtime.testing.record import argument_parser, emit, record

STEP_SECONDS = 0.05
TOKEN_SECONDS = 0.0072  # SmolLM2-135M in float32, 7.4 s for 8 x 128 tokens (base step)
DEVICE_SECONDS = 0.048  # adapter_gradient taps of SmolLM2 (wire)
TOKEN_BUDGET = 1024
REPLICA_FAILURES_PER_HOUR = 1 / (30 * 24)
DEVICE_FAILURES_PER_HOUR = 1 / (7 * 24)
REPLICA_BACK_SECONDS = 60.0
DEVICE_BACK_SECONDS = 30.0
CHECKPOINT_EVERY = 10
LOAD = 0.95  # of what the replicas compute, offered while jobs arrive
SIZES = {"1 job": 1, "2 to 9 jobs": 9, "10 to 99 jobs": 99, "100 jobs and more": 10**9}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    tenants: int
    jobs: int
    replicas: int
    devices: int
    failures: float = 1.0  # times the rates above


@dataclass(slots=True)
class Job:
    number: int
    tenant: int
    tenant_jobs: int
    rows: int
    length: int
    steps: int
    replica: int
    device: int
    done: int = 0
    asked: float = 0.0  # when its waiting microbatch arrived
    parts: int = 0  # of it, that are not computed yet


@dataclass(slots=True)
class Replica:
    queue: FairQueue = field(default_factory=FairQueue)
    jobs: int = 0
    busy: bool = False
    gone_until: float = 0.0
    life: int = 0  # grows with each failure, so that the end of a lost base step is known
    busy_seconds: float = 0.0


@dataclass(slots=True)
class Measured:
    queue_seconds: dict[str, list[float]] = field(default_factory=lambda: {size: [] for size in SIZES})
    decisions: int = 0
    decision_seconds: float = 0.0
    base_steps: int = 0
    real_tokens: int = 0
    computed_tokens: int = 0
    steps_done: int = 0
    steps_repeated: int = 0
    jobs_done: int = 0
    failures: int = 0


class Simulation:
    """`run` plays the events in order of time; nothing else knows the time."""

    def __init__(self, scale: Scale, seed: int) -> None:
        self._scale, self._random = scale, random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order, self._tickets = itertools.count(), itertools.count()
        self._replicas = [Replica() for _ in range(scale.replicas)]
        self._device_free = [0.0] * scale.devices
        self._of_device: list[set[int]] = [set() for _ in range(scale.devices)]
        self._of_ticket: dict[int, Job] = {}
        self._down: dict[int, float] = {}  # job -> until when its device is being replaced
        self._jobs: list[Job] = []
        self.now = self.arrival_seconds = 0.0
        self.measured = Measured()

    def run(self) -> Measured:
        self._jobs = list(self._draw_jobs())
        work_seconds = sum(job.steps * job.rows * job.length for job in self._jobs) * TOKEN_SECONDS
        self.arrival_seconds = work_seconds / self._scale.replicas / LOAD
        for job in self._jobs:
            self._at(self._random.uniform(0, self.arrival_seconds), lambda job=job: self._start(job))
        for replica in range(self._scale.replicas):
            self._next_failure(REPLICA_FAILURES_PER_HOUR, lambda r=replica: self._fail_replica(r))
        for device in range(self._scale.devices):
            self._next_failure(DEVICE_FAILURES_PER_HOUR, lambda d=device: self._fail_device(d))
        while self._events[0][0] <= self.arrival_seconds:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
        return self.measured

    @property
    def replicas(self) -> int:
        return len(self._replicas)

    @property
    def utilisation(self) -> float:
        busy = sum(replica.busy_seconds for replica in self._replicas)
        return busy / (self._scale.replicas * self.arrival_seconds)

    def _draw_jobs(self) -> Iterator[Job]:
        """Tenants by Zipf's law, so that a few have thousands of jobs and most have one."""
        scale, drawn = self._scale, self._random
        weights = [1 / (rank + 1) ** 0.9 for rank in range(scale.tenants)]
        tenants = list(range(scale.tenants)) + drawn.choices(
            range(scale.tenants), weights, k=scale.jobs - scale.tenants
        )
        counts = [0] * scale.tenants
        for tenant in tenants:
            counts[tenant] += 1
        for number, tenant in enumerate(tenants):
            yield Job(
                number=number,
                tenant=tenant,
                tenant_jobs=counts[tenant],
                rows=min(64, int(4 * drawn.paretovariate(1.5))),
                length=min(512, max(8, round(32 * drawn.lognormvariate(0, 0.6)))),
                steps=min(2_000, int(drawn.paretovariate(1.3))),
                replica=number % scale.replicas,
                device=drawn.randrange(scale.devices),
            )

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), happen))

    # A job's life

    def _start(self, job: Job) -> None:
        job.replica = min(range(len(self._replicas)), key=lambda r: self._replicas[r].jobs)
        self._replicas[job.replica].jobs += 1
        self._of_device[job.device].add(job.number)
        self._ask(job)

    def _ask(self, job: Job) -> None:
        """For the next step: in parts that the token budget allows, the last of which ends the step."""
        job.asked, rows = self.now, max(1, min(job.rows, TOKEN_BUDGET // job.length))
        starts = range(0, job.rows, rows)
        job.parts = len(starts)
        for start in starts:
            self._queue(job, min(rows, job.rows - start))
        self._decide(job.replica)

    def _queue(self, job: Job, rows: int) -> None:
        ticket = next(self._tickets)
        self._of_ticket[ticket] = job
        waiting = Waiting(
            ticket=ticket,
            tenant_id=str(job.tenant),
            job_id=str(job.number),
            rows=rows,
            tokens=sum(max(1, job.length - row % 3) for row in range(rows)),
            padded=PaddedRow(job.length),
            train=True,
        )
        self._replicas[job.replica].queue.add(waiting, now=self.now)

    def _decide(self, number: int) -> None:
        replica = self._replicas[number]
        if replica.busy or replica.gone_until > self.now or not len(replica.queue):
            return
        started = time.thread_time()
        chosen = replica.queue.choose(token_budget=TOKEN_BUDGET, now=self.now)
        replica.queue.take(chosen, now=self.now)
        self.measured.decision_seconds += time.thread_time() - started
        self.measured.decisions += 1
        padded = padded_tokens(chosen)
        seconds = STEP_SECONDS + TOKEN_SECONDS * padded
        replica.busy = True
        self._at(
            self.now + seconds, lambda life=replica.life: self._end(number, life, chosen, padded, seconds)
        )

    def _end(self, number: int, life: int, chosen: tuple[Waiting, ...], padded: int, seconds: float) -> None:
        replica, measured = self._replicas[number], self.measured
        jobs = [(self._of_ticket.pop(waiting.ticket), waiting) for waiting in chosen]
        if replica.life != life:
            for job, waiting in jobs:  # the lost part is computed again
                self._queue(job, waiting.rows)
            self._decide(number)
            return
        replica.busy = False
        replica.busy_seconds += seconds
        measured.base_steps += 1
        measured.computed_tokens += padded
        for job, waiting in jobs:
            measured.real_tokens += waiting.tokens
            job.parts -= 1
            if not job.parts:
                self._train(job)
        self._decide(number)

    def _train(self, job: Job) -> None:
        """The base model is done with the step; the device applies it when it is free."""
        self.measured.queue_seconds[_size(job.tenant_jobs)].append(self.now - job.asked)
        ready = max(self.now, self._device_free[job.device], self._down.get(job.number, 0.0)) + DEVICE_SECONDS
        self._device_free[job.device] = ready
        self._at(ready, lambda: self._applied(job))

    def _applied(self, job: Job) -> None:
        job.done += 1
        self.measured.steps_done += 1
        if job.done < job.steps:
            self._ask(job)
            return
        self.measured.jobs_done += 1
        self._replicas[job.replica].jobs -= 1
        self._of_device[job.device].discard(job.number)

    # Failures

    def _next_failure(self, per_hour: float, happen: Callable[[], None]) -> None:
        wait_seconds = self._random.expovariate(per_hour * self._scale.failures / 3600)
        self._at(self.now + wait_seconds, happen)

    def _fail_replica(self, number: int) -> None:
        replica = self._replicas[number]
        self.measured.failures += 1
        replica.life, replica.busy = replica.life + 1, False
        replica.gone_until = self.now + REPLICA_BACK_SECONDS
        self._at(replica.gone_until, lambda: self._decide(number))
        self._next_failure(REPLICA_FAILURES_PER_HOUR, lambda: self._fail_replica(number))

    def _fail_device(self, device: int) -> None:
        self.measured.failures += 1
        for number in self._of_device[device]:
            job = self._jobs[number]
            repeated = min(job.done % CHECKPOINT_EVERY, job.done)
            job.done -= repeated
            self.measured.steps_repeated += repeated
            job.device = self._random.randrange(self._scale.devices)
            self._of_device[job.device].add(number)
            self._down[number] = self.now + DEVICE_BACK_SECONDS
        self._of_device[device] = {n for n in self._of_device[device] if self._jobs[n].device == device}
        self._next_failure(DEVICE_FAILURES_PER_HOUR, lambda: self._fail_device(device))


def _size(jobs: int) -> str:
    return next(size for size, most in SIZES.items() if jobs <= most)


def main() -> None:
    arguments = argument_parser(__doc__ or "").parse_args()
    started = datetime.now(UTC)
    size = Scale(tenants=10_000, jobs=100_000, replicas=64, devices=2_000)
    if arguments.quick:
        size = Scale(tenants=500, jobs=5_000, replicas=8, devices=100)
    runs = {}
    for failures in (1.0, 1000.0) if arguments.quick else (1.0, 100.0, 1000.0):
        simulation = Simulation(replace(size, failures=failures), arguments.seed)
        simulation.run()
        runs[f"failures x {failures:g}"] = summary(simulation)
    calm = next(iter(runs.values()))
    results: dict[str, Any] = {
        "tenants": size.tenants,
        "jobs": size.jobs,
        "replicas": size.replicas,
        "devices": size.devices,
        "token_budget": TOKEN_BUDGET,
        "utilisation": calm["utilisation"],
        "decisions_per_second_at_saturation": 1e3 / calm["decision_ms"],
        "replicas_at_saturation": 1e3 / calm["decision_ms"] / calm["decisions_per_second_per_replica"],
        "runs": runs,
    }
    emit(record("simulate", results, seed=arguments.seed, started=started), arguments.json)


def summary(simulation: Simulation) -> dict[str, Any]:
    measured = simulation.measured
    return {
        "simulated_hours": simulation.arrival_seconds / 3600,
        "utilisation": simulation.utilisation,
        "padding": 1 - measured.real_tokens / measured.computed_tokens,
        "steps_done": measured.steps_done,
        "steps_repeated": measured.steps_repeated,
        "jobs_done": measured.jobs_done,
        "failures": measured.failures,
        "decision_ms": 1e3 * measured.decision_seconds / measured.decisions,
        "decisions_per_second_per_replica": measured.decisions
        / simulation.arrival_seconds
        / simulation.replicas,
        "queue_seconds_p50_p90_p99": {
            size: _percentiles(waits) for size, waits in measured.queue_seconds.items()
        },
    }


def _percentiles(waits: list[float]) -> list[float]:
    if len(waits) < 2:
        return []
    cuts = statistics.quantiles(waits, n=100)
    return [round(cuts[at], 2) for at in (49, 89, 98)]


if __name__ == "__main__":
    main()
