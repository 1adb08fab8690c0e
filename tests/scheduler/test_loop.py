"""The scheduler loop against a base model whose steps end when the test says so."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from cola_runtime.config import SchedulerSettings
from cola_runtime.errors import Unavailable
from cola_runtime.rows import Row
from cola_runtime.scheduler.loop import SchedulerLoop
from cola_runtime.scheduler.tickets import Computed
from cola_runtime.scheduler.waiting import Due
from cola_runtime.types import BaseStep, BaseStepResult, Gang, Lease, Segment, SegmentLoss


class SteppedBase:
    """Runs a base step until the test finishes it, in order like the real one."""

    def __init__(self) -> None:
        self.running: list[tuple[BaseStep, asyncio.Future[BaseStepResult]]] = []
        self.arrived = asyncio.Event()

    async def run(self, step: BaseStep) -> BaseStepResult:
        future: asyncio.Future[BaseStepResult] = asyncio.get_running_loop().create_future()
        self.running.append((step, future))
        self.arrived.set()
        return await future

    async def next_step(self, count: int = 1) -> BaseStep:
        async with asyncio.timeout(5):
            while len(self.running) < count:
                self.arrived.clear()
                await self.arrived.wait()
        return self.running[count - 1][0]

    def finish(self, *, seconds: float = 1.0, refused: str = "") -> None:
        step, future = self.running.pop(0)
        tokens = sum(segment.tokens for segment in step.segments)
        losses = tuple(
            SegmentLoss(
                job_id=s.lease.job_id,
                loss_sum=1.0,
                weight_sum=2.0,
                reason="LEASE_UNKNOWN" if s.lease.job_id == refused else None,
            )
            for s in step.segments
        )
        future.set_result(
            BaseStepResult(
                number=step.number,
                losses=losses,
                started=0.0,
                seconds=seconds,
                computed_tokens=tokens,
                real_tokens=tokens,
            )
        )

    def break_down(self) -> None:
        self.running.pop(0)[1].set_exception(RuntimeError("out of memory"))


def segment(
    job: str, *, length: int = 10, devices: tuple[str, ...] = ("d0",), gang: Gang | None = None
) -> Segment:
    row = Row(tokens=np.zeros(length, np.int32), weights=np.ones(length, np.float32))
    lease = Lease(job_id=job, epoch=1, device_id=devices[0], further_device_ids=devices[1:])
    return Segment(lease=lease, version=0, rows=(row,), loss_denominator=1.0, gang=gang)


@contextlib.asynccontextmanager
async def running_loop(
    base: SteppedBase, **settings: Any
) -> AsyncIterator[tuple[SchedulerLoop, list[Exception]]]:
    lost: list[Exception] = []
    loop = SchedulerLoop(base, SchedulerSettings(**settings), on_base_lost=lost.append)  # type: ignore[arg-type]
    task = asyncio.create_task(loop.run_forever())
    try:
        yield loop, lost
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def submit(loop: SchedulerLoop, job: str, **options: Any) -> asyncio.Task[Computed]:
    return asyncio.create_task(loop.compute(segment(job, **options), tenant_id=job, train=True))


async def test_waiting_tenants_go_into_one_mixed_base_step() -> None:
    base = SteppedBase()
    async with running_loop(base, token_budget=100) as (loop, _):
        tasks = [submit(loop, job) for job in ("a", "b", "c")]
        step = await base.next_step()
        assert [s.lease.job_id for s in step.segments] == ["a", "b", "c"]
        base.finish(seconds=3.0)
        results = await asyncio.gather(*tasks)
        assert [r.base_seconds for r in results] == pytest.approx([1.0, 1.0, 1.0])
        assert loop.busy_seconds == 3.0


async def test_gangs_and_unmerged_tenants_never_share_a_base_step_and_all_get_theirs() -> None:
    base, gang = SteppedBase(), Gang(name="group/one", combine="mean")
    async with running_loop(base, token_budget=100, base_steps_in_flight=1) as (loop, _):
        gangs = {"a": gang, "b": None, "c": gang, "d": Gang(name="job/d", combine="sum")}
        tasks = [submit(loop, job, gang=of_job) for job, of_job in gangs.items()]
        composed = []
        for _ in range(3):
            step = await base.next_step()
            composed.append([s.lease.job_id for s in step.segments])
            base.finish()
        await asyncio.gather(*tasks)
    assert composed == [["a", "c"], ["b"], ["d"]]


async def test_a_filled_second_step_is_sent_while_the_first_runs_and_a_third_is_not() -> None:
    base = SteppedBase()
    async with running_loop(base, token_budget=10, base_steps_in_flight=2) as (loop, _):
        tasks = [submit(loop, job) for job in ("a", "b", "c")]
        await base.next_step(2)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(base.running) == 2
        base.finish()
        await base.next_step(2)
        base.finish()
        base.finish()
        await asyncio.gather(*tasks)


async def test_a_part_filled_step_waits_for_company_until_the_running_one_is_about_to_end() -> None:
    base = SteppedBase()
    async with running_loop(base, token_budget=100) as (loop, _):
        first = submit(loop, "warm")
        await base.next_step()
        base.finish(seconds=1.0)  # 0.1 s per token: the next step of 10 tokens should take 1 s
        await first
        tasks = [submit(loop, "a")]
        await base.next_step()
        tasks += [submit(loop, "b")]
        await asyncio.sleep(0.02)
        assert len(base.running) == 1, "b is held back while a runs"
        tasks += [submit(loop, "c")]
        base.finish(seconds=1.0)
        step = await base.next_step()
        assert [s.lease.job_id for s in step.segments] == ["b", "c"]
        base.finish()
        await asyncio.gather(*tasks)


@pytest.mark.parametrize("devices", [("slow",), ("d1", "slow")], ids=["whole", "sharded"])
async def test_a_parked_device_parks_only_its_own_tenants(devices: tuple[str, ...]) -> None:
    base = SteppedBase()
    async with running_loop(base, token_budget=100) as (loop, _):
        loop.park("slow", parked=True)
        slow = submit(loop, "a", devices=devices)
        fast = submit(loop, "b")
        step = await base.next_step()
        assert [s.lease.job_id for s in step.segments] == ["b"]
        assert loop.waiting_reason("a") == "device slow is still busy with earlier gradients"
        base.finish()
        await fast
        loop.park("slow", parked=False)
        await base.next_step()
        base.finish()
        await slow


async def test_a_failed_base_step_fails_its_members_and_reports_the_base_lost() -> None:
    base = SteppedBase()
    async with running_loop(base) as (loop, lost):
        task = submit(loop, "a")
        await base.next_step()
        base.break_down()
        with pytest.raises(Unavailable, match="out of memory") as caught:
            await task
        assert (caught.value.reason, len(lost)) == ("BASE_MODEL_LOST", 1)


async def test_cancelling_gives_the_place_in_the_queue_back() -> None:
    base = SteppedBase()
    async with running_loop(base, token_budget=10, base_steps_in_flight=1) as (loop, _):
        first = submit(loop, "a")
        await base.next_step()
        second = submit(loop, "b")
        await asyncio.sleep(0)
        second.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await second
        base.finish()
        await first
        await asyncio.sleep(0.01)
        assert base.running == []
        assert loop.waiting_reason("b") is None


async def test_a_sharded_lease_waits_for_each_of_its_devices() -> None:
    base = SteppedBase()
    async with running_loop(base, token_budget=100) as (loop, _):
        loop.park("d1", parked=True)
        loop.park("d2", parked=True)
        task = submit(loop, "a", devices=("d1", "d2"))
        await asyncio.sleep(0.01)
        loop.park("d1", parked=False)
        await asyncio.sleep(0.01)
        assert base.running == []
        assert loop.waiting_reason("a") == "device d2 is still busy with earlier gradients"
        loop.park("d2", parked=False)
        await base.next_step()
        assert loop.waiting_reason("a") is None
        base.finish()
        await task


async def test_generated_tokens_put_their_tenant_behind() -> None:
    base = SteppedBase()
    async with running_loop(base, token_budget=10, base_steps_in_flight=1) as (loop, _):
        first = submit(loop, "warm")
        await base.next_step()
        loop.charge("a", 30)
        tasks = [submit(loop, "a"), submit(loop, "b")]
        await asyncio.sleep(0)
        assert loop.waiting_reason("a") == "queued for a base step: 1 tenant before it"
        base.finish()
        assert (await base.next_step()).segments[0].lease.job_id == "b"
        base.finish()
        await base.next_step()
        base.finish()
        await asyncio.gather(first, *tasks)


async def test_a_job_whose_deadline_is_in_danger_says_so_and_so_do_those_behind_it() -> None:
    base = SteppedBase()
    now = asyncio.get_running_loop().time()
    async with running_loop(base, token_budget=10, base_steps_in_flight=1) as (loop, _):
        tasks = [submit(loop, "warm")]
        await base.next_step()
        for job, due in (("calm", None), ("late", Due(deadline=now + 5, latest_start=now - 1))):
            computing = loop.compute(segment(job), tenant_id="a", train=True, due=due)
            tasks.append(asyncio.create_task(computing))
        await asyncio.sleep(0)
        assert loop.waiting_reason("late") == (
            "queued for a base step: next in the fair order; its deadline is in danger, "
            "so it goes before its tenant's other jobs"
        )
        assert loop.waiting_reason("calm") == (
            "queued for a base step: 1 job of its tenant before it; "
            "1 of the jobs before it because their deadlines are in danger"
        )
        for job in ("late", "calm"):
            base.finish()
            assert (await base.next_step()).segments[0].lease.job_id == job
        base.finish()
        await asyncio.gather(*tasks)


async def test_a_refused_segment_has_no_share_of_its_base_steps_seconds() -> None:
    base = SteppedBase()
    async with running_loop(base, token_budget=100) as (loop, _):
        tasks = [submit(loop, job) for job in ("a", "b")]
        await base.next_step()
        base.finish(seconds=3.0, refused="b")
        assert [(await task).base_seconds for task in tasks] == pytest.approx([3.0, 0.0])


async def test_a_base_step_holds_only_adapters_that_the_bank_has_room_for() -> None:
    base = SteppedBase()
    loop = SchedulerLoop(
        base,  # type: ignore[arg-type]
        SchedulerSettings(token_budget=100, base_steps_in_flight=1),
        on_base_lost=lambda error: None,
        bank_bytes=100,
    )
    for job, size in (("a", 60), ("b", 60), ("c", 40)):
        loop.note_adapter(job, size)
    running = asyncio.create_task(loop.run_forever())
    try:
        tasks = [submit(loop, job) for job in ("a", "b", "c", "a")]
        composed = []
        for _ in range(3):
            step = await base.next_step()
            composed.append([s.lease.job_id for s in step.segments])
            base.finish()
        await asyncio.gather(*tasks)
        assert composed == [["a", "c"], ["b"], ["a"]]
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
