"""Steps are dealt out evenly: how long one takes, and how much of what waits goes into it."""

from __future__ import annotations

import asyncio
import contextlib
import math

import pytest

from cola_runtime.config import SchedulerSettings
from cola_runtime.scheduler.even_steps import EvenSteps, StepTimes
from cola_runtime.scheduler.loop import SchedulerLoop
from cola_runtime.testing.modelled import STEP_SECONDS, TOKEN_SECONDS, ModelledBase, ModelledJob
from cola_runtime.testing.virtual_time import run_in_virtual_time

JOBS, TOKENS = 8, 40


def test_a_steps_time_is_a_fixed_cost_and_one_per_token() -> None:
    times = StepTimes()
    assert times.of(100) == 0.0
    for tokens in (40, 240, 40, 120):
        times.add(tokens, 0.3 + 0.005 * tokens)
    assert times.of(160) == pytest.approx(0.3 + 0.8)


def test_steps_of_one_size_say_nothing_of_a_fixed_cost() -> None:
    times = StepTimes()
    for seconds in (1.0, 1.2, 0.8):
        times.add(100, seconds)
    assert times.of(200) == pytest.approx(2 * times.of(100))


def test_neither_cost_is_ever_below_zero() -> None:
    falling, steep = StepTimes(), StepTimes()
    for tokens, seconds in ((100, 2.0), (300, 1.0)):
        falling.add(tokens, seconds)
        steep.add(tokens, seconds if tokens == 300 else 0.01)
    assert falling.of(1000) == pytest.approx(falling.of(0))
    assert falling.of(0) > 0.0
    assert steep.of(0) == pytest.approx(0.0)


def test_there_is_no_bound_before_a_job_has_come_back() -> None:
    even = EvenSteps()
    even.waits("a", 10, now=0.0)
    assert even.room(now=0.0) == math.inf


def test_jobs_that_do_not_come_back_are_expected_no_longer() -> None:
    even = EvenSteps()
    for job in ("a", "b", "c"):
        even.waits(job, 100, now=0.0)
        even.stops_waiting(job, 100, computed=True)
        even.ends(job, 100, now=1.0, away=True)
    even.times.add(300, 100.0)
    even.waits("a", 100, now=2.0)  # a turnaround of 1 s
    assert even.room(now=2.0) == pytest.approx(0.5 * 300 + 50)
    even.forget("b")
    assert even.room(now=2.0) == pytest.approx(0.5 * 200 + 50)
    assert even.room(now=4.0) == pytest.approx(0.5 * 100 + 50)  # c is late


def test_what_is_taken_back_or_failed_is_expected_no_longer() -> None:
    even = EvenSteps()
    even.waits("a", 100, now=0.0)
    even.stops_waiting("a", 100, computed=True)
    even.ends("a", 100, now=0.0, away=True)
    even.times.add(100, 100.0)
    even.waits("a", 100, now=1.0)
    even.waits("b", 100, now=1.0)
    even.stops_waiting("b", 100, computed=False)
    even.waits("c", 100, now=1.0)
    even.stops_waiting("c", 100, computed=True)
    even.ends("c", 100, now=1.0, away=False)
    assert even.room(now=1.0) == pytest.approx(0.5 * 100 + 50)


def test_a_few_jobs_that_come_back_together_are_soon_computed_in_equal_halves() -> None:
    """One comes back early the first time: taking whatever waits would compute 1, 1 and 6 jobs for good."""

    async def run() -> list[int]:
        base = ModelledBase(unpadded=True)
        loop = SchedulerLoop(base, SchedulerSettings(token_budget=2048), on_base_lost=print, unpadded=True)
        tasks = [asyncio.create_task(loop.run_forever())]
        device_seconds = 3 * (STEP_SECONDS + TOKEN_SECONDS * TOKENS)
        for number in range(JOBS):
            job = ModelledJob(
                job_id=f"job-{number}",
                tenant_id=f"tenant-{number}",
                rows=1,
                draw=lambda _random: TOKENS,
                device_seconds=device_seconds,
            )
            tasks.append(asyncio.create_task(job.run(loop, seed="0")))
            await asyncio.sleep(0.01)
        await base.done(30)
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return [len(step.tokens_by_job) for step in base.steps]

    sizes = run_in_virtual_time(run())
    assert sizes[-10:] == [JOBS // 2] * 10
