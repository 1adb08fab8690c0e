"""SIGKILL to a device in the middle: its tenants move to the other one and end with the same adapter."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import psutil
import pytest
import torch

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.config import ServiceSettings
from cola_runtime.runtime.coordinator import RunningService, running_service
from cola_runtime.testing.exactness import (
    MixedJob,
    exported_weights,
    four_tenants,
    largest_difference,
    service_for,
    tenant_client,
    train_reference,
)
from cola_runtime.testing.tiny_models import save_tiny_model
from tests.faults.test_ray_ports import is_loopback, listening

STEPS = 24
KILL_AT = 9
CHECKPOINT_EVERY = 4
SHARDS = (1, 2, 1, 1)  # the second one, whose norm is clipped, is on both devices: it waits for a new one


@pytest.mark.ray
@pytest.mark.timeout(240)
async def test_a_killed_device_costs_only_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = save_tiny_model("llama", tmp_path / "model")
    jobs = [
        MixedJob(
            spec=job.spec.model_copy(update={"checkpoint_every": CHECKPOINT_EVERY, "shards": shards}),
            training=job.training,
        )
        for job, shards in zip(four_tenants("llama", steps=STEPS, encoding="auto"), SHARDS, strict=True)
    ]
    settings = service_for(tmp_path / "service", model=model, name="llama", dtype="float32", token_budget=128)
    async with running_service(settings) as service, AsyncExitStack() as stack:
        ours = psutil.Process().children(recursive=True)
        _check_ray_is_private(ours, settings)
        assert {process.nice() for process in ours} == {psutil.Process().nice()}, "nobody's heartbeats starve"
        handles = [await _submit(service, job, stack) for job in jobs]
        killed, held = await _kill_when_under_way(handles, service, stack)
        for handle, job in zip(handles, jobs, strict=True):
            await handle.wait(120)
            await _check_each_step_once(handle)
            folder = await handle.download_adapter(tmp_path / handle.name)
            alone = train_reference(job, service.base_model, model, attention="sdpa")
            assert largest_difference(exported_weights(folder, service.base_model), alone) <= 2e-5
        lost = [await _lost_leases(handle) for handle in handles]
        told = [await _lease_events(handle) for handle in handles]
        assert lost[1] >= 1, "each device had a shard of this one"
        for devices, losses in zip(held, lost, strict=True):
            assert (losses > 0) == (killed in devices), f"{killed} killed; held {held}, lost {lost}: {told}"
        assert any(killed not in devices for devices in held), f"nobody was with the other device: {told}"


def _check_ray_is_private(ours: list[psutil.Process], settings: ServiceSettings) -> None:
    """Of a service in a process of somebody else, who imported ray long ago, as of `cola serve`."""
    assert [at for process, *at in listening(ours) if not is_loopback(at[0])] == []
    [raylet] = [process for process in ours if process.name() == "raylet"]
    assert raylet.environ()["RAY_AUTH_TOKEN_PATH"] == str(settings.ray_token.resolve())


async def _submit(service: RunningService, job: MixedJob, stack: AsyncExitStack) -> AsyncJobHandle:
    client: AsyncClient = await stack.enter_async_context(await tenant_client(service, job.spec.name))
    return await client.submit(job.spec, training=job.training)


async def _kill_when_under_way(
    handles: list[AsyncJobHandle], service: RunningService, stack: AsyncExitStack
) -> tuple[str, list[list[str]]]:
    """SIGKILL the device with the most jobs once every job has applied KILL_AT steps; returns which one, and
    with which ones each job was then.
    """
    watcher: AsyncClient = await stack.enter_async_context(await tenant_client(service, "watcher"))
    async with asyncio.timeout(90):
        async for _event in handles[0].events():
            if min([(await handle.refresh()).version for handle in handles]) >= KILL_AT:
                break
    held = [await _devices(handle) for handle in handles]
    device = max((await watcher.describe()).devices, key=lambda device: device.jobs)
    os.kill(device.pid, signal.SIGKILL)
    return device.device_id, held


async def _check_each_step_once(handle: AsyncJobHandle) -> None:
    steps = await handle.metrics()
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
    epochs = [step.epoch for step in steps]
    assert epochs == sorted(epochs), "an older lease never applies after a newer one"


async def _devices(handle: AsyncJobHandle) -> list[str]:
    """Of the job's newest lease."""
    events = [event async for event in handle.events(follow=False)]
    newest = [event.data for event in events if event.kind == "lease.granted"][-1]
    return list(newest.get("device_ids", [newest["device_id"]]))


async def _lease_events(handle: AsyncJobHandle) -> list[str]:
    events = [event async for event in handle.events(follow=False)]
    return [f"{event.created_at} {event.message}" for event in events if event.kind.startswith("lease.")]


async def _lost_leases(handle: AsyncJobHandle) -> int:
    """How many leases the job lost; each rewind goes back to a checkpoint, less than an interval ago."""
    events = [event async for event in handle.events(follow=False)]
    for event in events:
        if event.kind == "job.rewound":
            assert event.data["from"] - event.data["to"] <= CHECKPOINT_EVERY
    return sum(event.kind == "lease.lost" for event in events)
