"""Tenants' accounts on a whole service: they add up to what the base model did, also over a restart."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch
from recorded_steps import when_recorded

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.errors import PermissionDenied
from cola_runtime.jobs.records import StepRecord
from cola_runtime.testing.exactness import four_tenants, service_for, tenant_client, tokenized
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model

STEPS = 12
WAIT_SECONDS = 60.0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    return save_tiny_model("gpt2", tmp_path / "model")


async def test_tenants_base_seconds_add_up_to_what_the_base_model_was_busy(
    model: Path, tmp_path: Path
) -> None:
    settings = service_for(tmp_path / "service", model=model, name="tiny", dtype="float32")
    jobs = four_tenants("tiny", steps=STEPS, encoding="auto")[:3]
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(await tenant_client(service, f"tenant-{number}"))
            for number in range(3)
        ]
        handles = [
            await client.submit(job.spec, training=job.training, evaluation=job.training)
            for client, job in zip(clients, jobs, strict=True)
        ]
        for handle in handles:
            await handle.wait(WAIT_SECONDS)
        accounts = await clients[0].usage_of_all()
        busy_seconds = (await clients[0].describe()).base_busy_seconds
        assert sum(each.base_seconds for each in accounts) == pytest.approx(busy_seconds, rel=1e-9)
        for client, handle, job in zip(clients, handles, jobs, strict=True):
            account = await client.usage()
            assert account in accounts
            steps = await handle.metrics()
            assert account.tokens == sum(step.tokens for step in steps)
            assert account.bytes_up == sum(step.bytes_up for step in steps)
            rows = tokenized(job.training, job.spec, service.base_model)
            assert account.evaluation_tokens == 2 * sum(row.length for row in rows)
        key = (await clients[0].create_key("reader", scopes=["jobs:read"])).key
        async with AsyncClient(base_url=f"grpc://{service.endpoint}", api_key=key) as reader:
            assert (await reader.usage()).jobs == 0
            with pytest.raises(PermissionDenied):
                await reader.usage_of_all()


async def test_a_restart_of_the_coordinator_counts_no_step_twice(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = service_for(tmp_path / "service", model=model, name="tiny", dtype="float32")
    job = four_tenants("tiny", steps=STEPS, encoding="auto")[0]
    spec = job.spec.model_copy(update={"checkpoint_every": 5})
    async with running_in_process(settings) as (service, _):
        await service.store.create_tenant("alice")
        key = await service.store.create_key("alice")
        stopped = asyncio.Event()

        async def never(_: StepRecord) -> None:
            stopped.set()
            await asyncio.Event().wait()

        when_recorded(service.store, 8, never, monkeypatch)
        async with AsyncClient(base_url=f"grpc://{service.endpoint}", api_key=key) as client:
            handle = await client.submit(spec, training=job.training)
            async with asyncio.timeout(WAIT_SECONDS):
                await stopped.wait()
            before = await client.usage()
        monkeypatch.undo()
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        client = AsyncClient(base_url=f"grpc://{service.endpoint}", api_key=key)
        handle = await (await stack.enter_async_context(client)).job(handle.job_id)
        await handle.wait(WAIT_SECONDS)
        after, steps = await client.usage(), await handle.metrics()
    assert (before.steps, before.repeated_steps) == (8, 0)
    assert (after.steps, after.repeated_steps) == (STEPS, 3)
    assert after.tokens == sum(step.tokens for step in steps)
    lost = after.bytes_up - sum(step.bytes_up for step in steps)
    assert 0 < lost < before.bytes_up
