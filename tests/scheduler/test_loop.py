"""The scheduler loop against a base model whose steps end when the test says so."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cola_runtime.config import SchedulerSettings
from cola_runtime.errors import Unavailable
from cola_runtime.scheduler.loop import SchedulerLoop
from cola_runtime.scheduler.tickets import Computed
from cola_runtime.types import BaseStep, BaseStepResult, Gang, Lease, Row, Segment, SegmentLoss


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

    def finish(self, *, seconds: float = 1.0, predictions: Sequence[tuple[float, ...]] = ()) -> None:
        step, future = self.running.pop(0)
        predicted = predictions or [()] * len(step.segments)
        tokens = sum(segment.tokens for segment in step.segments)
        losses = tuple(
            SegmentLoss(job_id=s.lease.job_id, loss_sum=1.0, weight_sum=2.0, predictions=values)
            for s, values in zip(step.segments, predicted, strict=True)
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


def segment(job: str, *, length: int = 10, device: str = "d0", gang: Gang | None = None) -> Segment:
    row = Row(tokens=np.zeros(length, np.int32), weights=np.ones(length, np.float32))
    lease = Lease(job_id=job, epoch=1, device_id=device)
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


async def test_a_parked_device_parks_only_its_own_tenants() -> None:
    base = SteppedBase()
    async with running_loop(base, token_budget=100) as (loop, _):
        loop.park("slow", parked=True)
        slow = submit(loop, "a", device="slow")
        fast = submit(loop, "b", device="d0")
        step = await base.next_step()
        assert [s.lease.job_id for s in step.segments] == ["b"]
        assert "busy with earlier gradients" in (loop.waiting_reason("a") or "")
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
        with pytest.raises(Unavailable, match="out of memory"):
            await task
        assert len(lost) == 1


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


async def test_a_microbatch_in_parts_ends_its_step_with_the_last_one_and_gives_one_loss() -> None:
    base = SteppedBase()
    async with running_loop(base, token_budget=500, base_steps_in_flight=1) as (loop, _):
        whole = segment("a")
        rows = tuple(
            Row(tokens=np.zeros(length, np.int32), weights=np.zeros(0, np.float32), label=0)
            for length in (10, 200, 11, 200)
        )
        whole = replace(whole, rows=rows, row_numbers=(4, 5, 6, 7), microbatch=0)
        later = asyncio.create_task(loop.compute(whole, tenant_id="a", train=True))
        first = await base.next_step()
        base.finish(predictions=[(1.0, 3.0)])
        second = await base.next_step()
        base.finish(predictions=[(0.0, 2.0)])
        computed = await later
    parts = [step.segments[0] for step in (first, second)]
    assert [part.row_numbers for part in parts] == [(5, 7), (4, 6)], "longest rows first"
    assert [(part.microbatch, part.last_microbatch) for part in parts] == [(0, False), (1, True)]
    assert (computed.loss.loss_sum, computed.loss.weight_sum) == (2.0, 4.0)
    assert computed.loss.predictions == (0.0, 1.0, 2.0, 3.0)
    assert computed.base_seconds == pytest.approx(2.0)


async def test_rows_that_were_parked_on_the_way_go_on_where_they_were() -> None:
    base = SteppedBase()
    async with running_loop(base, token_budget=20, base_steps_in_flight=1) as (loop, _):
        whole = segment("a")
        whole = replace(whole, rows=whole.rows * 3)
        task = asyncio.create_task(loop.compute(whole, tenant_id="a", train=True))
        await base.next_step()
        loop.park("d0", parked=True)
        base.finish()
        await asyncio.sleep(0.01)
        assert base.running == []
        loop.park("d0", parked=False)
        last = (await base.next_step()).segments[0]
        assert (len(last.rows), last.microbatch, last.last_microbatch) == (1, 1, True)
        base.finish()
        await task
