"""Evaluations at intervals on a whole service: each once whatever is lost, the best kept, an early end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_steps import when_recorded

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.client.values import Event
from cola_runtime.config import ServiceSettings
from cola_runtime.jobs.records import StepRecord
from cola_runtime.runtime.coordinator import RunningService
from cola_runtime.spec import EvaluationSpec, OptimizerSpec
from cola_runtime.testing.exactness import (
    MixedJob,
    exported_weights,
    four_tenants,
    largest_difference,
    service_for,
    tenant_client,
    train_reference,
)
from cola_runtime.testing.in_process import InProcessDevices, running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model

STEPS = 30
WAIT_SECONDS = 60.0
# A rate at which the tiny model soon leaves what the held-out rows want.
OVERSHOOTING = OptimizerSpec(learning_rate=0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings(model: Path, tmp_path: Path) -> ServiceSettings:
    return service_for(tmp_path / "service", model=model, name="tiny", dtype="float32")


@asynccontextmanager
async def running(
    settings: ServiceSettings,
) -> AsyncIterator[tuple[RunningService, InProcessDevices, AsyncClient]]:
    async with running_in_process(settings) as (service, devices), AsyncExitStack() as stack:
        client = await stack.enter_async_context(await tenant_client(service, "alice"))
        yield service, devices, client


def job(**changes: Any) -> MixedJob:
    template = four_tenants("tiny", steps=STEPS, encoding="auto")[0]
    spec = template.spec.model_copy(update={"evaluation": EvaluationSpec(every=3, patience=2), **changes})
    return MixedJob(spec=spec, training=template.training)


HELD_OUT = four_tenants("tiny", steps=STEPS, encoding="auto")[1].training


async def events(handle: AsyncJobHandle, kind: str) -> list[Event]:
    return [event async for event in handle.events(follow=False) if event.kind == kind]


async def test_a_job_stops_early_and_keeps_its_best_version(
    settings: ServiceSettings, tmp_path: Path, model: Path
) -> None:
    async with running(settings) as (service, _, client):
        wanted = job(optimizer=OVERSHOOTING)
        handle = await client.submit(wanted.spec, training=wanted.training, evaluation=HELD_OUT)
        done = await handle.wait(WAIT_SECONDS)
        found = await handle.evaluations()
        (best,) = [each for each in found if each.best]
        assert best.step > 0
        assert best.value == min(each.value for each in found)
        assert done.version == found[-1].step == best.step + 6 < STEPS
        (stopped,) = await events(handle, "job.stopped_early")
        assert (stopped.data["best_step"], stopped.data["best_value"]) == (best.step, best.value)
        kept = {each.version: each.best for each in await handle.checkpoints()}
        assert kept[best.step] and not kept[done.version]
        newest = await handle.download_adapter(tmp_path / "newest")
        last = await handle.download_adapter(tmp_path / "last", version=done.version)
        chosen = await handle.download_adapter(tmp_path / "best", version="best")
        assert (newest / "adapter_model.safetensors").read_bytes() == (
            last / "adapter_model.safetensors"
        ).read_bytes()
        adapter = exported_weights(chosen, service.base_model)
        shorter = MixedJob(spec=wanted.spec.model_copy(update={"steps": best.step}), training=wanted.training)
        alone = train_reference(shorter, service.base_model, model, attention="sdpa")
        assert largest_difference(adapter, alone) <= 2e-5


async def test_evaluations_change_nothing_of_the_training(
    settings: ServiceSettings, tmp_path: Path, model: Path
) -> None:
    async with running(settings) as (service, _, client):
        wanted = job(evaluation=EvaluationSpec(every=4))
        handle = await client.submit(wanted.spec, training=wanted.training, evaluation=HELD_OUT)
        await handle.wait(WAIT_SECONDS)
        assert [each.step for each in await handle.evaluations()] == [0, 4, 8, 12, 16, 20, 24, 28, 30]
        assert len(await events(handle, "evaluation.done")) == 9
        folder = await handle.download_adapter(tmp_path / "adapter")
        alone = train_reference(wanted, service.base_model, model, attention="sdpa")
        assert largest_difference(exported_weights(folder, service.base_model), alone) <= 2e-5


async def test_lost_leases_leave_each_evaluation_once_and_as_it_would_have_been(
    settings: ServiceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = job(evaluation=EvaluationSpec(every=2, keep_best=False), checkpoint_every=5)
    async with running(settings) as (service, devices, client):
        calm = await client.submit(wanted.spec, training=wanted.training, evaluation=HELD_OUT)
        await calm.wait(WAIT_SECONDS)
        when_recorded(service.store, 9, lambda step: devices.kill(step.device_id), monkeypatch)
        handle = await client.submit(wanted.spec, training=wanted.training, evaluation=HELD_OUT)
        await handle.wait(WAIT_SECONDS)
        assert await events(handle, "job.rewound")
        found, expected = await handle.evaluations(), await calm.evaluations()
        assert [each.step for each in found] == [each.step for each in expected] == list(range(0, 31, 2))
        for one, other in zip(found, expected, strict=True):
            assert one.value == pytest.approx(other.value, rel=1e-5)
            assert one.best == other.best


async def test_a_job_that_is_interrupted_between_evaluations_stops_where_it_would_have(
    settings: ServiceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = job(optimizer=OVERSHOOTING, evaluation=EvaluationSpec(every=1, patience=5))
    async with running(settings) as (service, _, client):
        calm = await client.submit(wanted.spec, training=wanted.training, evaluation=HELD_OUT)
        stopped_at = (await calm.wait(WAIT_SECONDS)).version
        held = asyncio.Event()

        async def hold(step: StepRecord) -> None:
            held.set()
            await asyncio.Event().wait()  # until the coordinator stops

        when_recorded(service.store, stopped_at - 2, hold, monkeypatch)
        handle = await client.submit(wanted.spec, training=wanted.training, evaluation=HELD_OUT)
        await asyncio.wait_for(held.wait(), WAIT_SECONDS)
        key = await service.store.create_key("alice")
    async with (
        running_in_process(settings) as (service, _devices),
        AsyncClient(base_url=f"grpc://{service.endpoint}", api_key=key) as client,
    ):
        again = await client.job(handle.job_id)
        assert (await again.wait(WAIT_SECONDS)).version == stopped_at
        assert [each.step for each in await again.evaluations()] == list(range(stopped_at + 1))
        assert len(await events(again, "job.stopped_early")) == 1
