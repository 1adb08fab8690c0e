from __future__ import annotations

from dataclasses import replace

import pytest
from job_samples import new_job, running, step

from cola_runtime.errors import Conflict, Fenced, InvalidInput
from cola_runtime.jobs.records import CheckpointRecord, Tenant
from cola_runtime.jobs.state import Trigger
from cola_runtime.jobs.store import JobStore
from cola_runtime.types import Lease


def checkpoint(lease: Lease, version: int, *, sha256: str = "a" * 64) -> CheckpointRecord:
    key = f"checkpoints/{lease.job_id}/{version}-{lease.epoch}"
    return CheckpointRecord(
        job_id=lease.job_id, version=version, epoch=lease.epoch, storage_key=key, bytes=10, sha256=sha256
    )


async def test_each_lease_has_the_next_epoch_and_ends_the_one_before(store: JobStore, tenant: Tenant) -> None:
    first = await running(store, tenant)
    second = await store.grant_lease(first.job_id, "device-2")
    job = await store.job(first.job_id)
    assert (first.epoch, second.epoch) == (1, 2)
    assert (job.epoch, job.device_id) == (2, "device-2")


@pytest.mark.parametrize("trigger", [Trigger.PAUSE, Trigger.CANCEL])
async def test_a_job_that_may_not_train_takes_no_lease(
    store: JobStore, tenant: Tenant, trigger: Trigger
) -> None:
    job = await store.create_job(new_job(tenant))
    await store.transition(job.job_id, trigger)
    with pytest.raises(Conflict) as caught:
        await store.grant_lease(job.job_id, "device-1")
    assert caught.value.reason == "JOB_NOT_ACTIVE"


async def test_steps_add_up_in_the_job(store: JobStore, tenant: Tenant) -> None:
    lease = await running(store, tenant)
    await store.record_step(step(lease, 1, loss=3.0))
    job = await store.record_step(step(lease, 2, loss=2.5, tokens=20))
    assert (job.version, job.last_loss, job.tokens, job.label_tokens) == (2, 2.5, 30, 15)
    assert (job.bytes_up, job.bytes_down, job.base_seconds, job.device_seconds) == (200, 100, 0.5, 0.25)
    recorded = await store.steps(lease.job_id)
    assert recorded[0] == replace(step(lease, 1, loss=3.0), applied_at="2026-01-02T03:04:05.000000Z")
    assert [each.step for each in await store.steps(lease.job_id, after=1)] == [2]
    assert [event.kind for event in await store.events(lease.job_id)][-2:] == ["step.applied"] * 2


async def test_the_same_step_again_changes_nothing(store: JobStore, tenant: Tenant) -> None:
    lease = await running(store, tenant)
    first = await store.record_step(step(lease, 1))
    again = await store.record_step(step(lease, 1))
    assert again == first
    assert len(await store.events(lease.job_id)) == 4  # queued, running, lease granted, step applied


async def test_a_recorded_step_with_other_numbers_is_refused(store: JobStore, tenant: Tenant) -> None:
    lease = await running(store, tenant)
    await store.record_step(step(lease, 1))
    with pytest.raises(Conflict) as caught:
        await store.record_step(step(lease, 1, loss=9.0))
    assert caught.value.reason == "STEP_REUSED"


@pytest.mark.parametrize("number", [-1, 0, 2, 3])
async def test_only_the_next_step_is_recorded(store: JobStore, tenant: Tenant, number: int) -> None:
    lease = await running(store, tenant)
    with pytest.raises(Conflict) as caught:
        await store.record_step(step(lease, number))
    assert caught.value.reason == "STEP_OUT_OF_ORDER"
    assert (await store.job(lease.job_id)).version == 0


async def test_an_older_or_invented_epoch_is_fenced(store: JobStore, tenant: Tenant) -> None:
    old = await running(store, tenant)
    await store.grant_lease(old.job_id, "device-2")
    for lease in (old, replace(old, epoch=3)):
        for attempt in (
            store.record_step(step(lease, 1)),
            store.checkpoints.record(checkpoint(lease, 0)),
            store.rewind(lease, 0),
        ):
            with pytest.raises(Fenced):
                await attempt
    assert await store.checkpoints.of(old.job_id) == []


@pytest.mark.parametrize("trigger", [Trigger.PAUSE, Trigger.REQUEUE, Trigger.CANCEL])
async def test_leaving_running_ends_the_lease(store: JobStore, tenant: Tenant, trigger: Trigger) -> None:
    lease = await running(store, tenant)
    job = await store.transition(lease.job_id, trigger)
    assert job.device_id is None
    with pytest.raises(Fenced):
        await store.record_step(step(lease, 1))
    assert (await store.job(lease.job_id)).version == 0


async def test_a_queued_job_takes_no_step(store: JobStore, tenant: Tenant) -> None:
    job = await store.create_job(new_job(tenant))
    lease = await store.grant_lease(job.job_id, "device-1")
    with pytest.raises(Conflict) as caught:
        await store.record_step(step(lease, 1))
    assert caught.value.reason == "JOB_NOT_RUNNING"


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
async def test_a_step_needs_finite_numbers(store: JobStore, tenant: Tenant, loss: float) -> None:
    lease = await running(store, tenant)
    with pytest.raises(InvalidInput) as caught:
        await store.record_step(step(lease, 1, loss=loss))
    assert caught.value.reason == "STEP_NOT_FINITE"


async def test_a_rewind_recounts_what_remains_and_keeps_what_was_spent(
    store: JobStore, tenant: Tenant
) -> None:
    old = await running(store, tenant)
    for number in (1, 2, 3):
        await store.record_step(step(old, number, loss=4.0 - number))
        await store.checkpoints.record(checkpoint(old, number))
    lease = await store.grant_lease(old.job_id, "device-2")
    job = await store.rewind(lease, 1)
    assert (job.version, job.last_loss, job.tokens, job.label_tokens) == (1, 3.0, 10, 5)
    assert (job.bytes_up, job.bytes_down, job.base_seconds, job.device_seconds) == (300, 150, 0.75, 0.375)
    assert [each.step for each in await store.steps(old.job_id)] == [1]
    assert [each.version for each in await store.checkpoints.of(old.job_id)] == [1]
    event = (await store.events(old.job_id))[-1]
    assert (event.kind, event.level, event.data) == (
        "job.rewound",
        "warning",
        {"from": 3, "to": 1, "epoch": 2},
    )
    job = await store.record_step(step(lease, 2))
    assert (job.version, job.bytes_up) == (2, 400)


async def test_a_rewind_to_the_start_forgets_the_loss(store: JobStore, tenant: Tenant) -> None:
    lease = await running(store, tenant)
    await store.record_step(step(lease, 1))
    job = await store.rewind(lease, 0)
    assert (job.version, job.last_loss, job.tokens) == (0, None, 0)


async def test_a_rewind_goes_back_only(store: JobStore, tenant: Tenant) -> None:
    lease = await running(store, tenant)
    before = await store.record_step(step(lease, 1))
    events = await store.events(lease.job_id)
    assert await store.rewind(lease, 1) == before
    for version in (-1, 2):
        with pytest.raises(Conflict) as caught:
            await store.rewind(lease, version)
        assert caught.value.reason == "REWIND_AHEAD"
    assert await store.events(lease.job_id) == events


async def test_the_newest_checkpoint_is_the_one_of_the_highest_version(
    store: JobStore, tenant: Tenant
) -> None:
    lease = await running(store, tenant)
    assert await store.checkpoints.latest(lease.job_id) is None
    for number in range(1, 4):
        await store.record_step(step(lease, number))
    for version in (3, 0, 1):
        await store.checkpoints.record(checkpoint(lease, version))
    latest = await store.checkpoints.latest(lease.job_id)
    assert latest == replace(checkpoint(lease, 3), created_at="2026-01-02T03:04:05.000000Z")
    assert [each.version for each in await store.checkpoints.of(lease.job_id)] == [0, 1, 3]


async def test_a_checkpoint_comes_after_its_step_and_once(store: JobStore, tenant: Tenant) -> None:
    lease = await running(store, tenant)
    with pytest.raises(Conflict) as caught:
        await store.checkpoints.record(checkpoint(lease, 1))
    assert caught.value.reason == "CHECKPOINT_AHEAD"
    await store.record_step(step(lease, 1))
    await store.checkpoints.record(checkpoint(lease, 1))
    events = await store.events(lease.job_id)
    await store.checkpoints.record(checkpoint(lease, 1))
    assert await store.events(lease.job_id) == events
    with pytest.raises(Conflict) as caught:
        await store.checkpoints.record(checkpoint(lease, 1, sha256="b" * 64))
    assert caught.value.reason == "CHECKPOINT_EXISTS"
