"""Ray's actors die and hang: the base model in the middle of its passes, a device for good or for a while."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.config import DeviceSettings, SpotCheckSettings
from cola_runtime.crash_points import BASE_MODEL_POINTS
from cola_runtime.runtime.coordinator import running_service
from cola_runtime.scheduler.spot_checks import Interval, SpotChecks
from cola_runtime.testing.exactness import MixedJob, service_for, tenant_client
from tests.faults.judging import (
    CHECKPOINT_EVERY,
    MODEL,
    STEPS,
    Accept,
    Faultless,
    fault_job,
    judge,
    train_faultless,
)
from tests.faults.processes import reach

JOB_SECONDS = 600.0
BASE_JOB = fault_job(steps=40, checkpoint_every=2)  # long enough to lose its base model at every point
TIMES = {"base_model.leased": 1, "base_model.tap": 20}
HANG_SECONDS = 8.0  # longer than the lease timeout

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@asynccontextmanager
async def serving(model: Path, folder: Path, **changes: object) -> AsyncIterator[AsyncClient]:
    """On Ray, with two devices."""
    settings = service_for(folder, model=model, name=MODEL, dtype="float32").model_copy(
        update={
            "devices": DeviceSettings(count=2, heartbeat_seconds=0.5, lease_timeout_seconds=5.0),
            **changes,
        }
    )
    async with running_service(settings) as service, await tenant_client(service, "alice") as client:
        yield client


async def started(client: AsyncClient, job: MixedJob, *, at: int) -> AsyncJobHandle:
    """The job, when it has taken `at` steps."""
    handle = await client.submit(job.spec, training=job.training)
    await reach(handle, at)
    return handle


async def holder(client: AsyncClient) -> int:
    """The process that trains the only job."""
    (device,) = (device for device in (await client.describe()).devices if device.jobs)
    return device.pid


def base_model_pid() -> int:
    (found,) = (p.pid for p in psutil.Process().children(recursive=True) if "BaseModelActor" in p.name())
    return found


async def test_a_base_model_that_dies_at_every_point_of_a_pass_loses_nothing(
    model: Path, tmp_path: Path, accept: Accept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job loses its base model at each point once, and Ray starts it again each time."""
    faultless = await train_faultless(model, tmp_path / "faultless", BASE_JOB)
    markers = {point: tmp_path / point for point in BASE_MODEL_POINTS}
    setting = ",".join(f"{point}:{TIMES.get(point, 3)}:{marker}" for point, marker in markers.items())
    monkeypatch.setenv("COLA_CRASH_AT", setting)
    async with serving(model, tmp_path / "service") as client:
        handle = await started(client, BASE_JOB, at=1)
        await handle.wait(JOB_SECONDS)
        found = [
            await judge(
                handle,
                faultless,
                part="base model",
                case=f"killed at {point}",
                faults=await died_at(marker),
                data_dir=tmp_path / "service",
            )
            for point, marker in markers.items()
        ]
    for outcome in found:
        accept(outcome)


async def test_actors_that_are_killed_or_hang_lose_nothing(
    model: Path, tmp_path: Path, faultless: Faultless, accept: Accept
) -> None:
    """A device SIGKILLed, a device and then the base model stopped for a while: a job each."""
    found = []

    async def judged(part: str, case: str, handle: AsyncJobHandle, fault: float) -> None:
        await handle.wait(JOB_SECONDS)
        found.append(await judge(handle, faultless, part=part, case=case, faults=[fault], data_dir=tmp_path))

    async with serving(model, tmp_path) as client:
        handle, fault = await started(client, fault_job(), at=4), time.time()
        os.kill(await holder(client), signal.SIGKILL)
        await judged("device", "SIGKILL", handle, fault)

        handle, fault = await started(client, fault_job(), at=4), time.time()
        await hang(await holder(client))
        await judged("device", f"SIGSTOP for {HANG_SECONDS:g} s, then SIGCONT", handle, fault)

        handle, fault = await started(client, fault_job(), at=4), time.time()
        await hang(base_model_pid())
        await judged("base model", f"SIGSTOP for {HANG_SECONDS:g} s, then SIGCONT", handle, fault)
    for outcome in found:
        accept(outcome)


async def test_a_base_model_that_dies_in_a_spot_check_makes_it_when_it_is_back(
    model: Path, tmp_path: Path, faultless: Faultless, accept: Accept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next process replays what the files hold of the steps that it remembered."""
    deaths: list[float] = []
    replay = SpotChecks._replay

    async def die_in_the_second(self: SpotChecks, interval: Interval, *rest: Any) -> float:
        if interval.first > 0 and not deaths:
            deaths.append(time.time())
            os.kill(base_model_pid(), signal.SIGKILL)
        return await replay(self, interval, *rest)

    monkeypatch.setattr(SpotChecks, "_replay", die_in_the_second)
    checks = SpotCheckSettings(trusted=1.0)
    async with serving(model, tmp_path, spot_checks=checks) as client:
        handle = await started(client, fault_job(), at=1)
        await handle.wait(JOB_SECONDS)
        events = [event async for event in handle.events(follow=False)]
        outcome = await judge(
            handle,
            faultless,
            part="base model",
            case="SIGKILL in a spot check",
            faults=deaths,
            data_dir=tmp_path,
        )
    told = [event for event in events if event.kind.startswith("spot_check")]
    assert {event.kind for event in told} == {"spot_check.passed"}, told
    assert all("all bits" in event.message for event in told)
    assert {event.data["last"] for event in told} == set(range(CHECKPOINT_EVERY, STEPS + 1, CHECKPOINT_EVERY))
    accept(outcome)


async def hang(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(HANG_SECONDS)
    finally:
        os.kill(pid, signal.SIGCONT)


async def died_at(marker: Path) -> list[float]:
    """When a process died at the marker's point; empty if none did."""
    try:
        return [await asyncio.to_thread(os.path.getmtime, marker)]
    except FileNotFoundError:
        return []
