"""Which replica computes which job, how rounds are kept even, and that no tenant gets a double share."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np
import pytest

from cola_runtime.config import SchedulerSettings
from cola_runtime.errors import Unavailable
from cola_runtime.jobs.plan import TrainingPlan
from cola_runtime.rows import Row
from cola_runtime.scheduler import replicas
from cola_runtime.scheduler.leases import LeaseBook
from cola_runtime.scheduler.loop import SchedulerLoop
from cola_runtime.scheduler.packing import PaddedRow
from cola_runtime.scheduler.policy import FairQueue
from cola_runtime.scheduler.replicas import Replica, ReplicaSet, Residents
from cola_runtime.scheduler.waiting import Share, Waiting
from cola_runtime.spec import CollaborationSpec
from cola_runtime.types import (
    BaseEvent,
    BaseStep,
    BaseStepResult,
    DeviceLinkChanged,
    LearningRateSchedule,
    Lease,
    OptimizerHyperparameters,
    Segment,
    SegmentLoss,
    StepRefused,
)

BOTH = ["tiny/0", "tiny/1"]
BUDGET, ROW_TOKENS = 64, 16
STEPS = 120


def plan(tokens: float, group: str | None = None) -> TrainingPlan:
    return TrainingPlan(
        adapter=None,  # type: ignore[arg-type]
        optimizer=OptimizerHyperparameters(kind="sgd", learning_rate=0.1),
        schedule=LearningRateSchedule(kind="constant", warmup_steps=0, total_steps=1),
        checkpoint_every=0,
        max_staleness=0,
        step_tokens=tokens,
        collaboration=None if group is None else CollaborationSpec(group=f"group-of-that-name-{group}"),
    )


def placed(*jobs: tuple[str, float, str | None], ready: list[str] = BOTH) -> tuple[Residents, dict[str, str]]:
    residents = Residents()
    where = {}
    for job_id, tokens, group in jobs:
        found = residents.place(job_id, plan(tokens, group), ready)
        assert found is not None
        where[job_id] = found
    return residents, where


def test_a_job_goes_where_the_round_is_shortest_and_stays_there() -> None:
    residents, where = placed(("large", 100, None), ("small", 10, None), ("next", 10, None))
    assert where == {"large": "tiny/0", "small": "tiny/1", "next": "tiny/1"}
    residents.leave("large")
    assert residents.place("small", plan(10), BOTH) == "tiny/1"


def test_a_group_is_together_and_other_groups_need_not_be() -> None:
    _, where = placed(("a", 100, "one"), ("b", 100, "one"), ("c", 1, "two"), ("d", 1, None))
    assert where == {"a": "tiny/0", "b": "tiny/0", "c": "tiny/1", "d": "tiny/1"}


def test_a_job_of_a_lost_replica_goes_elsewhere_and_waits_when_there_is_none() -> None:
    residents, where = placed(("a", 10, None), ("b", 10, None))
    assert where["b"] == "tiny/1"
    assert residents.place("b", plan(10), ["tiny/0"]) == "tiny/0"
    assert residents.place("b", plan(10), []) is None


def test_moves_are_made_until_no_more_shortens_the_longer_round_by_a_quarter() -> None:
    residents, _ = placed(*((f"job-{n}", 10, None) for n in range(4)), ready=["tiny/0"])
    moves = residents.rebalance(BOTH, [f"job-{n}" for n in range(4)])
    assert [(move.source, move.target) for move in moves] == [("tiny/0", "tiny/1")] * 2
    assert [len(residents.at(name)) for name in BOTH] == [2, 2]
    assert residents.rebalance(BOTH, [f"job-{n}" for n in range(4)]) == []


def test_near_even_rounds_leave_each_other_alone() -> None:
    residents, _ = placed(("a", 100, None), ("b", 90, None), ("c", 12, None))
    assert residents.rebalance(BOTH, ["a", "b", "c"]) == []


def test_a_group_and_jobs_that_hold_no_lease_are_not_moved() -> None:
    residents, _ = placed(("a", 10, "one"), ("b", 10, "one"), ("c", 10, None), ready=["tiny/0"])
    assert residents.rebalance(BOTH, ["a", "b"]) == []
    assert [move.job_id for move in residents.rebalance(BOTH, ["a", "b", "c"])] == ["c"]


class Served(dict[str, Counter[str]]):
    """Tokens by replica and tenant."""

    def of(self, tenant: str) -> int:
        return sum(counter[tenant] for counter in self.values())


class InstantBase:
    """Computes every base step at once, and counts whose tokens it computed."""

    def __init__(self, served: Counter[str]) -> None:
        self.served = served
        self.enough = asyncio.Event()

    async def run(self, step: BaseStep) -> BaseStepResult:
        await asyncio.sleep(0)
        for segment in step.segments:
            self.served[segment.lease.job_id.partition("@")[0]] += segment.tokens
        if self.served.total() >= STEPS * BUDGET:
            self.enough.set()
        tokens = sum(segment.tokens for segment in step.segments)
        return BaseStepResult(
            number=step.number,
            losses=tuple(SegmentLoss(job_id=each.lease.job_id) for each in step.segments),
            started=0.0,
            seconds=1e-6,
            computed_tokens=tokens,
            real_tokens=tokens,
        )


def one_row(job_id: str) -> Segment:
    row = Row(tokens=np.zeros(ROW_TOKENS, np.int32), weights=np.ones(ROW_TOKENS, np.float32))
    lease = Lease(job_id=job_id, epoch=1, device_id="device")
    return Segment(lease=lease, version=0, rows=(row,), loss_denominator=1.0)


async def contended(jobs: dict[str, list[str]], *, share: bool) -> Served:
    """Each replica's tenants always wait; ends when the first replica has computed STEPS full base steps."""
    served = Served({name: Counter() for name in jobs})
    settings = SchedulerSettings(token_budget=BUDGET, base_steps_in_flight=1)
    bases = {name: InstantBase(counter) for name, counter in served.items()}
    loops = {
        name: SchedulerLoop(base, settings, on_base_lost=lambda error: None)  # type: ignore[arg-type]
        for name, base in bases.items()
    }
    for name, loop in loops.items():
        loop.share_counters([other for another, other in loops.items() if share and another != name])

    async def keep_waiting(name: str, tenant: str) -> None:
        while True:
            await loops[name].compute(one_row(f"{tenant}@{name}"), tenant_id=tenant, train=True)

    tasks = [asyncio.create_task(loop.run_forever()) for loop in loops.values()]
    tasks += [
        asyncio.create_task(keep_waiting(name, tenant))
        for name, tenants in jobs.items()
        for tenant in tenants
        for _ in range(2 * BUDGET // ROW_TOKENS)  # so that nobody's place is ever empty
    ]
    async with asyncio.timeout(20):
        await bases["tiny/0"].enough.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return served


JOBS = {"tiny/0": ["both", "first"], "tiny/1": ["both", "second"]}


async def test_a_tenant_on_two_replicas_gets_one_share_of_them() -> None:
    served = await contended(JOBS, share=True)
    totals = [served.of(tenant) for tenant in ("both", "first", "second")]
    assert totals == pytest.approx([sum(totals) / 3] * 3, rel=0.1)


async def test_without_shared_counters_it_would_get_two() -> None:
    served = await contended(JOBS, share=False)
    assert served.of("both") == pytest.approx(2 * served.of("first"), rel=0.1)


async def test_what_a_tenant_got_where_nobody_else_was_does_not_hold_it_back_for_long() -> None:
    """A tenant that had another replica to itself waits for a few base steps here, not for all of those."""
    loop = SchedulerLoop(None, SchedulerSettings(token_budget=BUDGET), on_base_lost=lambda error: None)  # type: ignore[arg-type]
    loop.charge_elsewhere("both", 1000 * BUDGET)
    assert loop._queue.counter("both") == 4 * BUDGET


async def test_a_replica_does_not_decide_anew_when_another_one_sends_a_base_step() -> None:
    """With many replicas that would be most of what the coordinator does."""
    loop = SchedulerLoop(None, SchedulerSettings(token_budget=BUDGET), on_base_lost=lambda error: None)  # type: ignore[arg-type]
    loop.charge_elsewhere("both", BUDGET)
    assert not loop._wake.is_set()
    loop.charge("both", BUDGET)
    assert loop._wake.is_set()


def test_tokens_per_minute_are_of_all_replicas() -> None:
    queue = FairQueue()
    queue.set_share("capped", Share(tokens_per_minute=60))
    queue.charge("capped", 120, now=0.0, most_ahead=1.0)
    queue.add(waiting_microbatch("capped"), now=1.0)
    assert queue.choose(token_budget=BUDGET, now=1.0) == ()
    assert queue.next_ready() == 120.0


def waiting_microbatch(tenant: str) -> Waiting:
    return Waiting(
        ticket=1, tenant_id=tenant, job_id=tenant, rows=1, tokens=10, padded=PaddedRow(10), train=True
    )


class DialledBase:
    """A replica's process that devices dial: dies, hangs or fails as it is told."""

    def __init__(self, *, how: str = "") -> None:
        self.how = how
        self.dismissed: list[str] = []
        self.events: asyncio.Queue[BaseEvent] = asyncio.Queue()

    async def dismiss_device(self, device_id: str) -> None:
        if self.how == "hangs":
            await asyncio.sleep(3600)
        if self.how == "fails":
            raise Unavailable("BASE_MODEL_LOST", "gone")
        self.dismissed.append(device_id)

    async def next_events(self, after: int) -> tuple[int, list[BaseEvent]]:
        if self.how == "fails":
            self.how = ""
            raise Unavailable("BASE_MODEL_LOST", "gone")
        return after + 1, [await self.events.get()]

    async def describe(self) -> None:
        return None


def replica_set(*bases: DialledBase) -> ReplicaSet:
    made = [
        Replica(
            name=f"tiny/{number}",
            base=base,  # type: ignore[arg-type]
            loop=SchedulerLoop(base, SchedulerSettings(), on_base_lost=lambda error: None),  # type: ignore[arg-type]
            description=None,  # type: ignore[arg-type]
        )
        for number, base in enumerate(bases)
    ]
    return ReplicaSet(made, book=LeaseBook(), rebalance_seconds=3600.0)


async def test_a_device_is_dismissed_at_every_replica_and_one_that_was_away_is_told_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replicas, "DISMISS_SECONDS", 0.05)
    monkeypatch.setattr(replicas, "RETRY_SECONDS", 0.01)
    hangs, fails, well = DialledBase(how="hangs"), DialledBase(how="fails"), DialledBase()
    served = replica_set(hangs, fails, well)
    await served.dismiss("garage")
    assert [base.dismissed for base in (hangs, fails, well)] == [[], [], ["garage"]]
    running = asyncio.create_task(served.run_forever())
    async with asyncio.timeout(10):
        while "tiny/1" not in served.ready or not fails.dismissed:  # noqa: ASYNC110 (it may be ready for long)
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert fails.dismissed == ["garage"]


async def test_faults_that_any_replica_hears_are_told_of_one_device_only() -> None:
    bases = DialledBase(), DialledBase()
    served = replica_set(*bases)
    heard: list[tuple[str, str]] = []
    served.on_fault = lambda device_id, reason: heard.append((device_id, reason))
    alone = Lease(job_id="job-1", epoch=1, device_id="garage")
    sharded = Lease(job_id="job-2", epoch=1, device_id="garage", further_device_ids=("attic",))
    for base, lease in zip(bases, (alone, sharded), strict=True):
        base.events.put_nowait(StepRefused(lease=lease, reason="UPDATE_ROLLED_BACK", message=""))
    bases[1].events.put_nowait(
        DeviceLinkChanged(device_id="attic", connected=False, parked=False, fault="FRAME_CHECKSUM")
    )
    running = asyncio.create_task(served.run_forever())
    async with asyncio.timeout(10):
        while len(heard) < 2:  # noqa: ASYNC110 (nothing else tells)
            await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert heard == [("garage", "UPDATE_ROLLED_BACK"), ("attic", "FRAME_CHECKSUM")]
