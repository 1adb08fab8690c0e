"""Pinned checkpoints: kept for good, within what the tenant may keep."""

from __future__ import annotations

import pytest
from job_samples import running, step

from cola_runtime.errors import Conflict, NotFound, QuotaExceeded
from cola_runtime.jobs.records import CheckpointRecord, Tenant, TermChanges
from cola_runtime.jobs.store import JobStore
from cola_runtime.types import Lease


async def checkpointed(store: JobStore, tenant: Tenant, *, versions: range) -> Lease:
    lease = await running(store, tenant, total_steps=9)
    for version in range(1, max(versions) + 1):
        await store.record_step(step(lease, version))
    for version in versions:
        await store.checkpoints.record(checkpoint(lease, version))
    return lease


def checkpoint(lease: Lease, version: int) -> CheckpointRecord:
    return CheckpointRecord(
        job_id=lease.job_id,
        version=version,
        epoch=lease.epoch,
        storage_key=f"{lease.job_id}/{version}-{lease.epoch}",
        bytes=100,
        sha256=f"{version:064d}",
    )


async def test_the_newest_is_pinned_unless_a_version_is_named(store: JobStore, tenant: Tenant) -> None:
    lease = await checkpointed(store, tenant, versions=range(1, 4))
    assert (await store.checkpoints.pin(lease.job_id, None)).version == 3
    assert (await store.checkpoints.pin(lease.job_id, 1)).pinned
    assert [each.pinned for each in await store.checkpoints.of(lease.job_id)] == [True, False, True]
    await store.checkpoints.pin(lease.job_id, 1)
    events = [each.kind for each in await store.events(lease.job_id)]
    assert events.count("checkpoint.pinned") == 2, "a second time changes nothing"
    assert not (await store.checkpoints.unpin(lease.job_id, 1)).pinned
    assert [each.pinned for each in await store.checkpoints.of(lease.job_id)] == [False, False, True]


async def test_what_is_not_there_cannot_be_pinned(store: JobStore, tenant: Tenant) -> None:
    lease = await running(store, tenant)
    with pytest.raises(Conflict) as early:
        await store.checkpoints.pin(lease.job_id, None)
    assert early.value.reason == "ADAPTER_NOT_READY"
    lease = await checkpointed(store, tenant, versions=range(1, 2))
    for ask in (store.checkpoints.pin, store.checkpoints.unpin):
        with pytest.raises(NotFound) as unknown:
            await ask(lease.job_id, 7)
        assert unknown.value.reason == "CHECKPOINT_UNKNOWN"


async def test_pinned_bytes_of_all_its_jobs_count_against_the_tenants_cap(
    store: JobStore, tenant: Tenant
) -> None:
    one, other = [await checkpointed(store, tenant, versions=range(1, 3)) for _ in range(2)]
    await store.accounts.change_terms(tenant.tenant_id, TermChanges(pinned_bytes=250))
    await store.checkpoints.pin(one.job_id, 1)
    await store.checkpoints.pin(other.job_id, 1)
    with pytest.raises(QuotaExceeded) as full:
        await store.checkpoints.pin(other.job_id, 2)
    assert (full.value.reason, full.value.actual) == ("QUOTA_PINNED", "300 bytes")
    await store.checkpoints.unpin(one.job_id, 1)
    assert (await store.checkpoints.pin(other.job_id, 2)).pinned
