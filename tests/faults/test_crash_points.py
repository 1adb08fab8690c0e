"""A process dies at every named point, and the job ends as if it had not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cola_runtime.crash_points import BASE_MODEL_POINTS, COORDINATOR_POINTS, DEVICE_POINTS
from tests.faults.fleet_jobs import outcome_of
from tests.faults.judging import Accept, Faultless, Outcome, fault_job
from tests.faults.processes import Fleet, Zygote, fleet, submit

TIMES = {  # at which time the point is in the middle of the job; 1 where it is not named
    "store.transition.uncommitted": 2,
    "store.step.uncommitted": 5,
    "store.step.committed": 5,
    "store.checkpoint.uncommitted": 2,
    "store.checkpoint.committed": 2,
    "storage.written": 4,
    "storage.renamed": 4,
    "device.step_complete": 5,
    "device.step_applied": 5,
    "device.update_begun": 5,
    "device.update_sent": 5,
    "device.checkpoint_made": 2,
    "device.checkpoint_sent": 2,
    "base_model.forward": 5,
    "base_model.backward": 5,
    "base_model.tap": 30,
    "base_model.step_done": 5,
    "base_model.update_complete": 5,
    "base_model.installed": 5,
}
MORE = [("storage.written", 1), ("storage.renamed", 1), ("store.transition.committed", 2)]  # submission, end
AFTER_A_LOST_DEVICE = "store.rewind."  # what a coordinator does then only
QUICK = ("store.step.committed",)

pytestmark = pytest.mark.timeout(400)  # of the watch over a hanging test; the case's own target is judged


def crashes(points: tuple[str, ...]) -> list[tuple[str, int]]:
    named = [(point, TIMES.get(point, 1)) for point in points]
    return [*named, *(each for each in MORE if each[0] in points)]


def params(points: tuple[str, ...]) -> list[object]:
    return [
        pytest.param(point, times, id=f"{point}:{times}", marks=[pytest.mark.quick] * (point in QUICK))
        for point, times in crashes(points)
    ]


@pytest.mark.parametrize(("point", "times"), params((*COORDINATOR_POINTS, *BASE_MODEL_POINTS)))
async def test_a_coordinator_that_dies_loses_nothing(
    point: str,
    times: int,
    zygote: Zygote,
    model: Path,
    tmp_path: Path,
    faultless: Faultless,
    accept: Accept,
) -> None:
    """With the base model, which is in its process here."""
    marker = tmp_path / "died"
    async with fleet(zygote, tmp_path, model) as at:
        lost_first = point.startswith(AFTER_A_LOST_DEVICE)
        lost = f"device.step_applied:5:{tmp_path / 'lost'}" if lost_first else None
        at.start_device("device-0", crash=lost)
        await at.start_coordinator(crash=f"{point}:{times}:{marker}")
        reviving = asyncio.create_task(revive(at, marker, lost_first=lost_first))
        outcome = await trained(at, faultless, part="coordinator", case=f"killed at {point}, time {times}")
        await reviving
    accept(outcome)


async def revive(at: Fleet, marker: Path, *, lost_first: bool) -> None:
    """Whoever dies is started again, in whichever order they die."""

    async def device() -> None:
        await at.died(at.devices["device-0"], marker.with_name("lost"))
        at.start_device("device-0")

    async def coordinator() -> None:
        await at.died(at.coordinator, marker)
        await at.start_coordinator()

    await asyncio.gather(coordinator(), *([device()] if lost_first else []))


@pytest.mark.parametrize(("point", "times"), params(DEVICE_POINTS))
async def test_a_device_that_dies_loses_nothing(
    point: str,
    times: int,
    zygote: Zygote,
    model: Path,
    tmp_path: Path,
    faultless: Faultless,
    accept: Accept,
) -> None:
    marker = tmp_path / "died"

    async def revive_device() -> None:
        await at.died(at.devices["device-0"], marker)
        at.start_device("device-0")

    async with fleet(zygote, tmp_path, model) as at:
        at.start_device("device-0", crash=f"{point}:{times}:{marker}")
        await at.start_coordinator()
        reviving = asyncio.create_task(revive_device())
        outcome = await trained(at, faultless, part="device", case=f"killed at {point}, time {times}")
        await reviving
    accept(outcome)


async def trained(at: Fleet, faultless: Faultless, *, part: str, case: str) -> Outcome:
    async with at.client() as client:
        handle = await submit(client, fault_job())
    return await outcome_of(at, handle, faultless, of=(part, case), faults=at.faults)
