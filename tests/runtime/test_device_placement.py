"""A device that joins takes over a job at a step boundary; one that stands still holds up its own only."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.config import ServiceSettings
from cola_runtime.device import agent
from cola_runtime.device.worker import DeviceWorker
from cola_runtime.jobs.records import JobRecord, StepRecord
from cola_runtime.process_environment import child_environment
from cola_runtime.runtime.coordinator import RunningService
from cola_runtime.scheduler.leases import LeaseBook
from cola_runtime.testing.exactness import (
    MixedJob,
    exported_weights,
    four_tenants,
    largest_difference,
    service_for,
    tenant_client,
    train_reference,
)
from cola_runtime.testing.in_process import JOIN_TOKEN, running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model
from cola_runtime.types import Lease

STEPS, HELD_AT = 8, 3
WAIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("model"), dtype="float64")


@pytest.fixture(autouse=True)
def _equal_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; trials on a machine that does other work differ."""
    monkeypatch.setattr(agent, "optimizer_speed", lambda: 2.0**28)


def settings_for(folder: Path, model: Path, *, devices: int) -> ServiceSettings:
    settings = service_for(folder, model=model, name="tiny", dtype="float64")
    of_devices = {"count": devices, "heartbeat_seconds": 0.2, "rebalance_seconds": 0.2}
    changed = settings.devices.model_copy(update=of_devices)
    return settings.model_copy(update={"devices": changed})


async def submit(service: RunningService, jobs: Iterable[MixedJob], stack: AsyncExitStack) -> list[Any]:
    handles = []
    for job in jobs:
        client = await stack.enter_async_context(await tenant_client(service, job.spec.name))
        handles.append(await client.submit(job.spec, training=job.training))
    return handles


@asynccontextmanager
async def device_process(device_id: str, endpoint: str) -> AsyncIterator[None]:
    """`cola device` in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", "from cola_runtime.cli.main import main; main()"),
        *("device", "--coordinator", endpoint, "--id", device_id),
        env=child_environment(COLA_JOIN_TOKEN=JOIN_TOKEN),
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.kill()
        await process.wait()


class Held:
    """No job gets beyond `HELD_AT` before `go_on`: whatever the load, what follows happens in the middle."""

    def __init__(self, service: RunningService, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on = asyncio.Event()
        self._waiting: set[str] = set()
        self._changed = asyncio.Condition()
        record_step = service.store.record_step

        async def record_and_hold(record: StepRecord) -> JobRecord:
            job = await record_step(record)
            if record.step == HELD_AT:
                async with self._changed:
                    self._waiting.add(record.job_id)
                    self._changed.notify_all()
                await self.go_on.wait()
            return job

        monkeypatch.setattr(service.store, "record_step", record_and_hold)

    async def everybody(self, count: int) -> None:
        async with asyncio.timeout(WAIT_SECONDS), self._changed:
            await self._changed.wait_for(lambda: len(self._waiting) == count)


@pytest.mark.timeout(180)
async def test_a_device_process_that_joins_takes_over_a_job_and_nothing_is_computed_twice(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = four_tenants("tiny", steps=STEPS, encoding="auto")
    settings = settings_for(tmp_path / "service", model, devices=1)
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        held = Held(service, monkeypatch)
        _go_on_when_a_move_is_asked(held, monkeypatch)
        handles = await submit(service, jobs, stack)
        await stack.enter_async_context(device_process("late", service.endpoint))
        moved = 0
        for handle, job in zip(handles, jobs, strict=True):
            await handle.wait(WAIT_SECONDS)
            events = [event.kind async for event in handle.events(follow=False)]
            assert "lease.lost" not in events
            assert "job.rewound" not in events
            moved += await _moved(handle, "lease.moved" in events)
            folder = await handle.download_adapter(tmp_path / handle.name)
            alone = train_reference(job, service.base_model, model, attention="sdpa")
            assert largest_difference(exported_weights(folder, service.base_model), alone) <= 1e-9
        assert moved >= 1


def _go_on_when_a_move_is_asked(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_move = LeaseBook.ask_move

    def ask(self: LeaseBook, *arguments: Any) -> None:
        ask_move(self, *arguments)
        held.go_on.set()

    monkeypatch.setattr(LeaseBook, "ask_move", ask)


async def _moved(handle: AsyncJobHandle, said: bool) -> bool:
    """Each step once, in order; `device-0` first and, where it was said, `late` from some step on."""
    steps = await handle.metrics()
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
    devices = [step.device_id for step in steps]
    assert set(devices) == ({"device-0", "late"} if said else {"device-0"})
    assert devices == sorted(devices)
    return said


async def test_a_job_that_would_be_placed_where_it_is_does_not_move(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may have ended since it was asked to."""
    job = next(iter(four_tenants("tiny", steps=STEPS, encoding="auto")))
    recorded = LeaseBook.recorded

    def record_and_ask(self: LeaseBook, lease: Lease, version: int) -> None:
        recorded(self, lease, version)
        if version == HELD_AT:
            self.ask_move(lease, "towards a device that has less to do")

    monkeypatch.setattr(LeaseBook, "recorded", record_and_ask)
    settings = settings_for(tmp_path / "service", model, devices=1)
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        [handle] = await submit(service, [job], stack)
        assert (await handle.wait(WAIT_SECONDS)).version == STEPS
        kinds = [event.kind async for event in handle.events(follow=False)]
    assert kinds.count("lease.granted") == 1
    assert "lease.moved" not in kinds


@pytest.mark.timeout(120)
async def test_a_device_that_stands_still_parks_only_its_own_tenants(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = four_tenants("tiny", steps=STEPS, encoding="auto")
    settings = settings_for(tmp_path / "service", model, devices=2)
    settings = settings.model_copy(
        update={"devices": settings.devices.model_copy(update={"rebalance_seconds": 3600.0})}
    )
    workers = _Workers(monkeypatch)
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        held = Held(service, monkeypatch)
        handles = await submit(service, jobs, stack)
        await held.everybody(len(handles))
        stuck = workers.stop_one()
        held.go_on.set()
        try:
            waiting = [handle for handle in handles if handle.job_id in stuck]
            assert 1 <= len(waiting) < len(handles)
            for handle in handles:
                if handle not in waiting:
                    assert (await handle.wait(WAIT_SECONDS)).version == STEPS
            assert [(await handle.refresh()).version for handle in waiting] == [HELD_AT] * len(waiting)
        finally:
            workers.released.set()
        for handle in waiting:
            assert (await handle.wait(WAIT_SECONDS)).version == STEPS


class _Workers:
    """The devices' workers; one of them can be stopped. Its heartbeats go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.released = threading.Event()
        self._seen: list[DeviceWorker] = []
        self._stopped: DeviceWorker | None = None
        consume = DeviceWorker.consume

        def waiting(worker: DeviceWorker, items: Any) -> Any:
            if worker not in self._seen:
                self._seen.append(worker)
            if worker is self._stopped:
                self.released.wait(2 * WAIT_SECONDS)
            return consume(worker, items)

        monkeypatch.setattr(DeviceWorker, "consume", waiting)

    def stop_one(self) -> list[str]:
        """The jobs that are with it."""
        self._stopped = self._seen[0]
        return list(self._stopped._held)
