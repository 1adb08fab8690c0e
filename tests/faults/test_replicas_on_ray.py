"""Two base models, one of them on two replicas, as Ray actors: three tenants, and a replica that dies."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.client.values import Event, Replica
from cola_runtime.config import BaseModelSettings, DeviceSettings, ServiceSettings
from cola_runtime.jobs.records import JobRecord, StepRecord
from cola_runtime.jobs.store import JobStore
from cola_runtime.runtime import cluster
from cola_runtime.runtime.coordinator import running_service
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

LONG_STEPS = 20_000  # until it is cancelled
STEPS = 6
PAUSE_SECONDS = 0.1  # of a long job between two steps, so that what starts meanwhile has the processor
WAIT_SECONDS = 90.0
DIFFERENCE = 2e-6  # in float64; what is left is stock Llama's norms, which are in float32 in any dtype


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The handles of the base models' actors, by base model, in the order of their replicas."""
    handles: dict[str, list[Any]] = {}
    place = cluster.base_model_handle

    def kept(settings: ServiceSettings, chosen: BaseModelSettings, *others: Any) -> Any:
        handle = place(settings, chosen, *others)
        handles.setdefault(chosen.name, []).append(handle)
        return handle

    monkeypatch.setattr(cluster, "base_model_handle", kept)
    return handles


@pytest.fixture(autouse=True)
def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    record_step = JobStore.record_step

    async def record_and_pause(self: JobStore, step: StepRecord) -> JobRecord:
        job = await record_step(self, step)
        if job.total_steps == LONG_STEPS:
            await asyncio.sleep(PAUSE_SECONDS)
        return job

    monkeypatch.setattr(JobStore, "record_step", record_and_pause)


def settings_for(folder: Path, models: dict[str, Path]) -> ServiceSettings:
    settings = service_for(folder, model=models["tiny"], name="tiny", dtype="float64")
    [tiny] = settings.base_models
    other = tiny.model_copy(update={"name": "other", "path": models["other"]})
    return settings.model_copy(
        update={
            "base_models": (tiny.model_copy(update={"replicas": 2}), other),
            "devices": DeviceSettings(count=1),
            "scheduler": settings.scheduler.model_copy(update={"rebalance_seconds": 0.5}),
        }
    )


def job(base_model: str, number: int, steps: int) -> MixedJob:
    return four_tenants(base_model, steps=steps, encoding="auto")[number]


async def until(handle: AsyncJobHandle, kind: str, *, after: int = 0, **data: object) -> Event:
    """The first event of the kind behind `after` whose data says so."""
    async with asyncio.timeout(WAIT_SECONDS):
        async for event in handle.events(after=after):
            if event.kind == kind and data.items() <= event.data.items():
                return event
    raise AssertionError(f"the job ended without {kind}")


async def replicas(client: AsyncClient, base_model: str = "tiny") -> list[Replica]:
    described = (await client.describe()).base_models
    return [each for model in described if model.name == base_model for each in model.replicas]


@pytest.mark.ray
@pytest.mark.timeout(300)
async def test_a_replica_that_dies_gives_its_jobs_to_the_other_and_gets_some_back(
    tmp_path: Path, actors: dict[str, list[Any]]
) -> None:
    torch.set_num_threads(1)
    models = {
        "tiny": save_tiny_model("llama", tmp_path / "tiny"),
        "other": save_tiny_model("gpt2", tmp_path / "other"),
    }
    async with (
        running_service(settings_for(tmp_path / "service", models)) as service,
        AsyncExitStack() as stack,
    ):
        clients = [
            await stack.enter_async_context(await tenant_client(service, f"tenant-{n}")) for n in range(3)
        ]
        long = job("tiny", 0, LONG_STEPS)  # of all three, so that two and one are as even as can be
        handles = [await client.submit(long.spec, training=long.training) for client in clients]
        for handle in handles:
            await until(handle, "step.applied", step=3)
        before = await replicas(clients[0])
        assert sorted(each.jobs for each in before) == [1, 2]
        homes = [(await handle.refresh()).replica for handle in handles]

        ray.kill(actors["tiny"][1], no_restart=False)
        for handle, home in zip(handles, homes, strict=True):
            if home == "tiny/1":
                lost = await until(handle, "lease.lost")
                again = await until(handle, "lease.granted", after=lost.id)
                assert again.data["replica"] == "tiny/0"
                await until(handle, "step.applied", after=again.id)

        moves = [asyncio.create_task(until(handle, "lease.moved")) for handle in handles]
        await asyncio.wait(moves, return_when=asyncio.FIRST_COMPLETED)
        for move in moves:
            move.cancel()
        await asyncio.gather(*moves, return_exceptions=True)
        assert [each.state for each in await replicas(clients[0])] == ["ready", "ready"]

        short = {name: job(name, 1, STEPS) for name in models}
        for name, wanted in short.items():
            done = await clients[0].submit(wanted.spec, training=wanted.training)
            assert (await done.wait(WAIT_SECONDS)).state == "succeeded"
            base = next(each for each in service.base_models if each.name == name)
            folder = await done.download_adapter(tmp_path / f"adapter-{name}")
            alone = train_reference(wanted, base, models[name], attention="sdpa")
            assert largest_difference(exported_weights(folder, base), alone) <= DIFFERENCE
        assert [each.base_steps > 0 for each in await replicas(clients[0], "other")] == [True]
        for handle, home in zip(handles, homes, strict=True):
            await handle.cancel()
            lost_by = [event.message async for event in handle.events() if event.kind == "lease.lost"]
            assert bool(lost_by) == (home == "tiny/1"), lost_by  # nobody else noticed
