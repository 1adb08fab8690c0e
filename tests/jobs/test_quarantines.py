"""A device that was found wrong: it is let in no more, and what nobody checked of its work is taken back."""

from __future__ import annotations

import pytest
from job_samples import new_job, step
from test_pins import checkpoint

from cola_runtime.errors import Fenced, NotFound, Unauthenticated
from cola_runtime.jobs.records import Tenant
from cola_runtime.jobs.state import Trigger
from cola_runtime.jobs.store import JobStore
from cola_runtime.types import Lease


async def worked(store: JobStore, job_id: str, device: str, versions: range) -> Lease:
    """Steps and checkpoints of these versions under a new lease of the device."""
    lease = await store.grant_lease(job_id, device)
    for version in versions:
        await store.record_step(step(lease, version))
        await store.checkpoints.record(checkpoint(lease, version))
    return lease


async def a_job(store: JobStore, tenant: Tenant) -> str:
    job = await store.create_job(new_job(tenant, total_steps=9))
    await store.transition(job.job_id, Trigger.START)
    return job.job_id


async def versions(store: JobStore, job_id: str) -> list[int]:
    return [each.version for each in await store.checkpoints.of(job_id)]


async def test_its_unchecked_checkpoints_go_and_all_that_follow_from_them(
    store: JobStore, tenant: Tenant
) -> None:
    job_id, anothers = await a_job(store, tenant), await a_job(store, tenant)
    await worked(store, job_id, "good", range(1, 3))
    await worked(store, job_id, "evil", range(3, 6))
    await worked(store, job_id, "good", range(6, 8))
    await worked(store, anothers, "evil-twin", range(1, 3))
    await store.checkpoints.mark_checked(job_id, 3)
    first, changed = await store.devices.quarantine("evil", "SPOT_CHECK_FAILED", "it lied")
    assert (first, changed) == (True, [job_id])
    assert await versions(store, job_id) == [1, 2, 3], "version 3 was checked, 4 was not"
    assert await versions(store, anothers) == [1, 2], "another device's, whose name begins alike"
    assert await store.devices.quarantine("evil", "FRAME_CHECKSUM", "again") == (False, [])
    (kept,) = await store.devices.quarantines()
    assert (kept.device_id, kept.reason) == ("evil", "SPOT_CHECK_FAILED")


async def test_a_checkpoint_that_was_under_way_when_it_was_put_out_is_not_recorded(
    store: JobStore, tenant: Tenant
) -> None:
    job_id = await a_job(store, tenant)
    lease = await worked(store, job_id, "evil", range(1, 3))
    await store.devices.quarantine("evil", "SPOT_CHECK_FAILED", "it lied")
    await store.record_step(step(lease, 3))
    with pytest.raises(Fenced):
        await store.checkpoints.record(checkpoint(lease, 3))
    assert await versions(store, job_id) == []


async def test_a_job_that_has_ended_stays_as_it_is_and_says_who_trained_it(
    store: JobStore, tenant: Tenant
) -> None:
    job_id = await a_job(store, tenant)
    await worked(store, job_id, "evil", range(1, 10))
    await store.transition(job_id, Trigger.COMPLETE)
    assert await store.devices.quarantine("evil", "SPOT_CHECK_FAILED", "it lied") == (True, [])
    assert await versions(store, job_id) == list(range(1, 10))
    assert (await store.events(job_id))[-1].kind == "device.quarantined"


async def test_who_is_in_quarantine_is_not_let_in_until_it_is_reinstated(store: JobStore) -> None:
    await store.devices.quarantine("evil", "FRAME_CHECKSUM", "three times")
    with pytest.raises(Unauthenticated) as refused:
        await store.devices.check_not_quarantined("evil")
    assert refused.value.reason == "DEVICE_QUARANTINED"
    await store.devices.check_not_quarantined("good")
    await store.devices.reinstate("evil")
    await store.devices.check_not_quarantined("evil")
    with pytest.raises(NotFound) as unknown:
        await store.devices.reinstate("evil")
    assert unknown.value.reason == "DEVICE_NOT_QUARANTINED"
