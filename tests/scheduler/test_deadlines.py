"""A job's pace, and when its deadline is in danger by it."""

from __future__ import annotations

import asyncio

import pytest

from cola_runtime.job_choices import Priority
from cola_runtime.scheduler.deadlines import PACE_STEPS, Pace
from cola_runtime.scheduler.slots import JobSlots
from cola_runtime.scheduler.waiting import Due


def test_a_job_must_be_served_by_when_its_remaining_work_fits_one_and_a_half_times() -> None:
    pace = Pace(deadline=100.0, steps=10)
    assert pace.due(4, base_seconds=2.0) == Due(deadline=100.0, latest_start=100.0 - 1.5 * 6 * 2.0)
    pace.step_took(4.0)
    pace.step_took(6.0)
    assert pace.due(4, base_seconds=2.0).latest_start == pytest.approx(100.0 - 1.5 * 6 * 5.0)
    assert pace.due(9, base_seconds=8.0).latest_start == pytest.approx(100.0 - 1.5 * 8.0)


def test_only_the_latest_steps_tell_the_pace() -> None:
    pace = Pace(deadline=100.0, steps=10)
    for seconds in [50.0, *[1.0] * PACE_STEPS]:
        pace.step_took(seconds)
    assert pace.due(0, base_seconds=0.0).latest_start == pytest.approx(85.0)


async def test_a_deadline_in_danger_goes_first_where_the_tenants_cap_holds_jobs_back() -> None:
    slots, order = JobSlots(), list[str]()
    slots.set_limit("a", 1)
    now = asyncio.get_running_loop().time()

    async def run(job: str, due: Due | None, priority: Priority = Priority.NORMAL) -> None:
        await slots.enter("a", job, priority=priority, due=due)
        order.append(job)
        await asyncio.sleep(0)
        slots.leave("a", job)

    jobs = [
        run("first", None),
        run("high", None, Priority.HIGH),
        run("calm", Due(deadline=now + 100, latest_start=now + 50)),
        run("late", Due(deadline=now + 9, latest_start=now - 1), Priority.LOW),
    ]
    await asyncio.gather(*jobs)
    assert order == ["first", "late", "high", "calm"]
