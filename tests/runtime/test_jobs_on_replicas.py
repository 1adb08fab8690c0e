"""Jobs on several replicas of a base model, in one process: moved without a change, spread, and traced."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch
from moved_jobs import move_once

from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.config import ServiceSettings
from cola_runtime.errors import InvalidInput
from cola_runtime.jobs.bank_size import limited_bytes
from cola_runtime.jobs.plan import training_plan
from cola_runtime.jobs.records import JobRecord, StepRecord
from cola_runtime.jobs.store import JobStore
from cola_runtime.spec import CollaborationSpec, LoraSpec
from cola_runtime.testing.exactness import (
    MixedJob,
    exported_weights,
    four_tenants,
    largest_difference,
    service_for,
    tenant_client,
    train_reference,
)
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model
from cola_runtime.trace.report import read_trace

STEPS, MOVED_AT = 16, 6
WAIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


def settings_for(folder: Path, model: Path, *, replicas: int = 2) -> ServiceSettings:
    settings = service_for(folder, model=model, name="tiny", dtype="float32")
    [chosen] = settings.base_models
    return settings.model_copy(
        update={
            "base_models": (chosen.model_copy(update={"replicas": replicas}),),
            "scheduler": settings.scheduler.model_copy(update={"rebalance_seconds": 0.02}),
        }
    )


def jobs(**changes: object) -> list[MixedJob]:
    templates = four_tenants("tiny", steps=STEPS, encoding="adapter_gradient")
    return [MixedJob(spec=each.spec.model_copy(update=changes), training=each.training) for each in templates]


async def leases(handle: AsyncJobHandle) -> list[tuple[str, int]]:
    """Replica and first version of each of the job's leases."""
    events = [event async for event in handle.events(follow=False)]
    return [(e.data["replica"], e.data["version"]) for e in events if e.kind == "lease.granted"]


async def leased(handle: AsyncJobHandle) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        async for event in handle.events():
            if event.kind == "lease.granted":
                return


async def test_a_job_that_is_moved_between_replicas_ends_with_the_same_bits(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends, where = [], []
    for name in ("stayed", "moved"):
        if name == "moved":
            move_once(monkeypatch, at=MOVED_AT)
        async with (
            running_in_process(settings_for(tmp_path / name, model)) as (service, _),
            await tenant_client(service, "alice") as client,
        ):
            handle = await client.submit(jobs()[0].spec, training=jobs()[0].training)
            await handle.wait(WAIT_SECONDS)
            ends.append((await handle.checkpoints())[-1].sha256)
            where.append(await leases(handle))
            kinds = [event.kind async for event in handle.events(follow=False)]
            assert not {"lease.lost", "job.rewound"} & set(kinds)
    assert where == [[("tiny/0", 0)], [("tiny/0", 0), ("tiny/1", MOVED_AT)]]
    assert ends[0] == ends[1]


async def test_tenants_are_spread_and_a_group_is_not_and_the_trace_has_a_track_for_each_replica(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, record_step = asyncio.Event(), JobStore.record_step

    async def record_when_all_are_there(self: JobStore, step: StepRecord) -> JobRecord:
        await go_on.wait()
        return await record_step(self, step)

    monkeypatch.setattr(JobStore, "record_step", record_when_all_are_there)
    group = {"mode": "merged", "collaboration": CollaborationSpec(group="a-name-that-nobody-guesses")}
    wanted = [*jobs(**group)[:2], *jobs()[2:]]
    async with (
        running_in_process(settings_for(tmp_path / "service", model)) as (service, _),
        AsyncExitStack() as stack,
    ):
        clients = [
            await stack.enter_async_context(await tenant_client(service, f"tenant-{n}"))
            for n in range(len(wanted))
        ]
        await clients[0].start_trace()
        handles = [
            await client.submit(job.spec, training=job.training)
            for client, job in zip(clients, wanted, strict=True)
        ]
        for handle in handles:
            await leased(handle)
        go_on.set()
        for handle in handles:
            await handle.wait(WAIT_SECONDS)
        trace = json.loads(await clients[0].stop_trace())
        overview = await clients[0].describe()
        places = [await leases(handle) for handle in handles]
        with pytest.raises(InvalidInput, match="is not served here") as unknown:
            await clients[0].submit(jobs(base_model="tiny-two")[0].spec, training=jobs()[0].training)
    assert unknown.value.remedy.startswith("Served: tiny.")
    assert {replica for replica, _ in places[0]} == {replica for replica, _ in places[1]}
    assert {replica for of_job in places for replica, _ in of_job} == {"tiny/0", "tiny/1"}
    [base] = overview.base_models
    assert [(each.replica, each.state) for each in base.replicas] == [
        ("tiny/0", "ready"),
        ("tiny/1", "ready"),
    ]
    assert sum(each.base_steps for each in base.replicas) == overview.base_steps
    assert all(each.base_steps for each in base.replicas)
    assert set(read_trace(trace).base_models) == {"base model tiny/0", "base model tiny/1"}


async def test_more_jobs_train_than_the_bank_has_room_for_and_one_that_never_fits_is_refused(
    tmp_path: Path,
) -> None:
    model = save_tiny_model("gpt2", tmp_path / "model", dtype="float64")
    settings = service_for(tmp_path / "service", model=model, name="tiny", dtype="float64")
    wanted = jobs()
    async with running_in_process(settings) as (service, _):
        plans = [training_plan(job.spec, service.base_model, total_steps=STEPS) for job in wanted]
        sizes = [limited_bytes(plan, service.base_model) for plan in plans]
    [chosen] = settings.base_models
    limit = max(sizes)
    assert limit < sum(sizes) / 2
    limited = settings.model_copy(update={"base_models": (chosen.model_copy(update={"bank_bytes": limit}),)})
    async with running_in_process(limited) as (service, _), AsyncExitStack() as stack:
        handles = []
        for job in wanted:
            client = await stack.enter_async_context(await tenant_client(service, job.spec.name))
            handles.append(await client.submit(job.spec, training=job.training))
        for handle, job in zip(handles, wanted, strict=True):
            await handle.wait(WAIT_SECONDS)
            folder = await handle.download_adapter(tmp_path / handle.name)
            alone = train_reference(job, service.base_model, model, attention="sdpa")
            assert largest_difference(exported_weights(folder, service.base_model), alone) <= 1e-9
        [base] = (await client.describe()).base_models
        [replica] = base.replicas
        assert replica.bank_evicted_bytes > 0
        assert replica.bank_hits + replica.bank_misses > 0
        assert replica.bank_resident_bytes <= limit
        for handle in handles:
            assert "lease.lost" not in [event.kind async for event in handle.events(follow=False)]
        large = wanted[0].spec.model_copy(update={"adapter": LoraSpec(rank=64)})
        with pytest.raises(InvalidInput) as refused:
            await client.submit(large, training=wanted[0].training)
    assert (refused.value.reason, refused.value.limit) == ("BANK_TOO_SMALL", str(limit))
