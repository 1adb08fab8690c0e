"""Checkpoints that need not be kept go, record first; objects that nothing names go when a service starts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cola_runtime.config import RetentionSettings
from cola_runtime.jobs.records import CheckpointRecord, EvaluationRecord, NewJob, StepRecord
from cola_runtime.jobs.retention import superfluous
from cola_runtime.jobs.state import Trigger
from cola_runtime.jobs.store import JobStore
from cola_runtime.scheduler.retention import collect_orphans, retire
from cola_runtime.storage.objects import ObjectStorage
from cola_runtime.types import Lease

MIB = 1 << 20


def record(
    version: int, *, job_id: str = "job-1", size: int = MIB, suffix: str = "safetensors"
) -> CheckpointRecord:
    return CheckpointRecord(
        job_id=job_id,
        version=version,
        epoch=1,
        storage_key=f"checkpoints/{job_id}/{version:08d}-000001.{suffix}",
        bytes=size,
        sha256="0" * 64,
    )


def gone(versions: range, keep: tuple[int, ...] = (), **settings: int) -> list[int]:
    found = superfluous([record(v) for v in versions], keep=keep, settings=RetentionSettings(**settings))
    return [each.version for each in found]


def test_without_limits_all_are_kept() -> None:
    assert gone(range(1, 6)) == []


def test_the_last_ones_and_the_best_one_are_kept() -> None:
    assert gone(range(1, 6), keep_last=2) == [1, 2, 3]
    assert gone(range(1, 6), keep=(2,), keep_last=2) == [1, 3]


def test_bytes_are_bounded_but_the_newest_and_the_best_stay() -> None:
    assert gone(range(1, 6), max_bytes_per_job=2 * MIB) == [1, 2, 3]
    assert gone(range(1, 6), keep=(1,), max_bytes_per_job=2 * MIB) == [2, 3, 4]
    assert gone(range(5, 6), keep=(), max_bytes_per_job=MIB) == []
    assert (
        superfluous([record(1, size=9 * MIB)], keep=(), settings=RetentionSettings(max_bytes_per_job=MIB))
        == []
    )


@pytest.fixture
async def store() -> AsyncIterator[JobStore]:
    opened = await JobStore.open("sqlite://")
    yield opened
    await opened.close()


async def trained(store: JobStore, *, steps: int, best: int | None = None) -> Lease:
    tenant = await store.create_tenant("acme")
    job = await store.create_job(
        NewJob(
            tenant_id=tenant.tenant_id,
            name="chat",
            base_model="tiny",
            spec_json="{}",
            total_steps=steps,
            encoding="adapter_gradient",
            training_key="datasets/job-1/training.jsonl",
            request_digest="d",
        )
    )
    await store.transition(job.job_id, Trigger.START)
    lease = await store.grant_lease(job.job_id, "device-0")
    for step in range(1, steps + 1):
        await store.record_step(
            StepRecord(
                job_id=job.job_id,
                epoch=1,
                step=step,
                loss=1.0,
                learning_rate=0.1,
                gradient_norm=1.0,
                tokens=2,
                label_tokens=1,
                device_id="device-0",
            )
        )
        if step == best:
            await store.record_evaluation(
                EvaluationRecord(
                    job_id=job.job_id,
                    step=step,
                    epoch=1,
                    metrics={"loss": 1.0},
                    primary="loss",
                    greater_is_better=False,
                    improved=True,
                )
            )
    return lease


async def stored(store: JobStore, storage: ObjectStorage, each: CheckpointRecord) -> CheckpointRecord:
    storage.put(each.storage_key, b"content")
    await store.checkpoints.record(each)
    return each


async def test_what_is_retired_leaves_record_and_storage(store: JobStore, tmp_path: Path) -> None:
    storage = ObjectStorage(f"file://{tmp_path}")
    lease = await trained(store, steps=6)
    for version in (2, 4):
        sharded = await stored(store, storage, record(version, job_id=lease.job_id, suffix="json"))
        for number in (0, 1):
            storage.put(sharded.storage_key.replace(".json", f"-{number}.safetensors"), b"shard")
    kept = await stored(store, storage, record(6, job_id=lease.job_id))
    settings = RetentionSettings(keep_last=1)
    await retire(lease.job_id, store=store, storage=storage, settings=settings)
    assert storage.list("checkpoints/") == [kept.storage_key]
    assert [each.version for each in await store.checkpoints.of(lease.job_id)] == [6]
    assert (await store.events(lease.job_id))[-1].data == {"versions": [2, 4]}
    await retire(lease.job_id, store=store, storage=storage, settings=settings)
    assert (await store.events(lease.job_id))[-1].data == {"versions": [2, 4]}, "nothing more to say"


async def test_the_best_evaluations_checkpoint_stays(store: JobStore, tmp_path: Path) -> None:
    storage = ObjectStorage(f"file://{tmp_path}")
    lease = await trained(store, steps=3, best=1)
    for version in (1, 2, 3):
        await stored(store, storage, record(version, job_id=lease.job_id))
    await retire(lease.job_id, store=store, storage=storage, settings=RetentionSettings(keep_last=1))
    assert [each.version for each in await store.checkpoints.of(lease.job_id)] == [1, 3]


async def test_a_pinned_checkpoint_stays_until_it_is_unpinned(store: JobStore, tmp_path: Path) -> None:
    storage = ObjectStorage(f"file://{tmp_path}")
    lease = await trained(store, steps=4)
    for version in (1, 2, 3, 4):
        await stored(store, storage, record(version, job_id=lease.job_id))
    await store.checkpoints.pin(lease.job_id, 2)
    settings = RetentionSettings(keep_last=1)
    await retire(lease.job_id, store=store, storage=storage, settings=settings, keep={3})
    assert [each.version for each in await store.checkpoints.of(lease.job_id)] == [2, 3, 4]
    await store.checkpoints.unpin(lease.job_id, 2)
    await retire(lease.job_id, store=store, storage=storage, settings=settings)
    assert [each.version for each in await store.checkpoints.of(lease.job_id)] == [4]
    assert len(storage.list("checkpoints/")) == 1


async def test_only_objects_that_nothing_names_are_collected(store: JobStore, tmp_path: Path) -> None:
    storage = ObjectStorage(f"file://{tmp_path}")
    lease = await trained(store, steps=4)
    whole = await stored(store, storage, record(2, job_id=lease.job_id))
    index = await stored(store, storage, record(4, job_id=lease.job_id, suffix="json"))
    shard = index.storage_key.replace(".json", "-0.safetensors")
    named = ["datasets/job-1/training.jsonl", whole.storage_key, index.storage_key, shard]
    orphans = [
        "datasets/job-2/training.jsonl",
        f"checkpoints/{lease.job_id}/00000003-000001.safetensors",
        f"checkpoints/{lease.job_id}/00000003-000001-0.safetensors",
    ]
    for key in {*named, *orphans, "exports/of-somebody-else"}:
        storage.put(key, b"content")
    assert await collect_orphans(store, storage) == len(orphans)
    assert storage.list() == sorted([*named, "exports/of-somebody-else"])
    assert await collect_orphans(store, storage) == 0
