"""What is to be checked is recorded with the checkpoint at its end, or not at all, until it has been."""

from __future__ import annotations

from dataclasses import replace

import pytest
from job_samples import running, step
from test_pins import checkpoint

from cola_runtime.errors import Conflict
from cola_runtime.jobs.records import Tenant
from cola_runtime.jobs.spot_check_rows import PendingCheck
from cola_runtime.jobs.store import JobStore
from cola_runtime.types import Lease


def check_of(lease: Lease, last: int) -> PendingCheck:
    return PendingCheck(
        job_id=lease.job_id,
        epoch=lease.epoch,
        first=0,
        last=last,
        device_ids=("garage", "shed, the second"),
        shards=(1,),
        replica="tiny/0",
    )


async def test_a_check_is_pending_from_its_checkpoint_on_until_it_is_forgotten(
    store: JobStore, tenant: Tenant, url: str
) -> None:
    lease, other = await running(store, tenant), await running(store, tenant)
    for each in (lease, other):
        for number in (1, 2):
            await store.record_step(step(each, number))
    await store.checkpoints.record(checkpoint(other, 1), check=check_of(other, 1))
    await store.checkpoints.record(checkpoint(lease, 1), check=check_of(lease, 1))
    await store.checkpoints.record(checkpoint(lease, 2), check=check_of(lease, 2))  # the interval got further
    await store.close()
    again = await JobStore.open(url)
    pending = sorted((check_of(lease, 2), check_of(other, 1)), key=lambda each: each.job_id)
    assert await again.checkpoints.pending_checks() == pending
    for _ in range(2):
        await again.checkpoints.forget_check(check_of(lease, 2))
    assert await again.checkpoints.pending_checks() == [check_of(other, 1)]
    await again.close()


async def test_a_checkpoint_that_is_refused_leaves_nothing_to_check(store: JobStore, tenant: Tenant) -> None:
    lease = await running(store, tenant)
    with pytest.raises(Conflict):
        await store.checkpoints.record(checkpoint(lease, 1), check=check_of(lease, 1))
    assert await store.checkpoints.pending_checks() == []
    await store.record_step(step(lease, 1))
    await store.checkpoints.record(checkpoint(lease, 1))
    same, changed = check_of(lease, 1), replace(check_of(lease, 1), shards=(0, 1))
    for check in (same, changed):
        await store.checkpoints.record(checkpoint(lease, 1), check=check)
    assert await store.checkpoints.pending_checks() == [changed]
