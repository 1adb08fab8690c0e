"""A coordinator or a device that is told to stop leaves at a step boundary: nothing is computed again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.config import ServiceSettings
from cola_runtime.testing.exactness import MixedJob, four_tenants, service_for, tenant_client
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model

STEPS = 20
WAIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings(model: Path, tmp_path: Path) -> ServiceSettings:
    return service_for(tmp_path / "service", model=model, name="tiny", dtype="float32")


def rarely_checkpointed() -> MixedJob:
    """Whoever is not given time for a checkpoint begins anew."""
    job = four_tenants("tiny", steps=STEPS, encoding="auto")[0]
    spec = job.spec.model_copy(update={"checkpoint_every": 1000})
    return MixedJob(spec=spec, training=job.training)


async def under_way(client: AsyncClient) -> AsyncJobHandle:
    job = rarely_checkpointed()
    handle = await client.submit(job.spec, training=job.training)
    async with asyncio.timeout(WAIT_SECONDS):
        async for event in handle.events():
            if event.kind == "step.applied" and event.data["step"] >= 3:
                return handle
    raise AssertionError("the job ended early")


async def check_nothing_again(handle: AsyncJobHandle) -> list[str]:
    """Each step was applied once; returns who took them."""
    assert (await handle.wait(WAIT_SECONDS)).state == "succeeded"
    events = [event async for event in handle.events(follow=False)]
    assert [e.data["step"] for e in events if e.kind == "step.applied"] == list(range(1, STEPS + 1))
    assert not any(event.kind == "job.rewound" for event in events)
    return [event.data["device_id"] for event in events if event.kind == "step.applied"]


async def test_a_drained_coordinator_leaves_its_jobs_at_a_checkpoint(settings: ServiceSettings) -> None:
    async with running_in_process(settings) as (service, _), await tenant_client(service, "alice") as client:
        handle = await under_way(client)
        await service.drain()
        stopped = await handle.refresh()
        assert (stopped.state, stopped.version < STEPS) == ("queued", True)
        assert [each.version for each in await handle.checkpoints()] == [stopped.version]
        waiting = await client.submit(rarely_checkpointed().spec, training=rarely_checkpointed().training)
        key = await service.store.create_key("alice")
    async with (
        running_in_process(settings) as (service, _),
        AsyncClient(base_url=f"grpc://{service.endpoint}", api_key=key) as client,
    ):
        await check_nothing_again(await client.job(handle.job_id))
        await check_nothing_again(await client.job(waiting.job_id))


async def test_a_drained_device_hands_its_jobs_over_and_ends(settings: ServiceSettings) -> None:
    async with (
        running_in_process(settings) as (service, devices),
        await tenant_client(service, "alice") as client,
    ):
        handle = await under_way(client)
        (holder,) = (each.device_id for each in (await client.describe()).devices if each.jobs)
        async with asyncio.timeout(WAIT_SECONDS):
            await devices.agents[holder].drain()
            await devices.tasks[holder]
        took = await check_nothing_again(handle)
        (other,) = {"device-0", "device-1"} - {holder}
        lost = [
            event.data["reason"] async for event in handle.events(follow=False) if event.kind == "lease.lost"
        ]
        assert lost == ["DEVICE_DRAINING"]
        moved = took.index(other)
        assert set(took[:moved]) == {holder}
        assert set(took[moved:]) == {other}
