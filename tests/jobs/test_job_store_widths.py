"""Numbers and texts as great as callers may give them fit, on either database."""

from __future__ import annotations

from job_samples import new_job, running, step

from cola_runtime.jobs.records import Tenant, TermChanges
from cola_runtime.jobs.state import Trigger
from cola_runtime.jobs.store import JobStore
from cola_runtime.jobs.terms import MOST_CAP


async def test_a_lease_of_many_devices_with_long_names(store: JobStore, tenant: Tenant) -> None:
    job = await store.create_job(new_job(tenant))
    await store.transition(job.job_id, Trigger.START)
    devices = [f"{number:02d}".ljust(63, "x") for number in range(16)]
    lease = await store.grant_lease(job.job_id, *devices)
    await store.record_step(step(lease, 1))
    assert (await store.job(job.job_id)).device_id == lease.devices


async def test_the_greatest_caps(store: JobStore, tenant: Tenant) -> None:
    most = TermChanges(
        tokens_per_minute=MOST_CAP,
        concurrent_jobs=MOST_CAP,
        total_steps=MOST_CAP,
        pinned_bytes=MOST_CAP,
    )
    await store.accounts.change_terms(tenant.tenant_id, most)
    terms = await store.accounts.terms(tenant.tenant_id)
    assert (terms.concurrent_jobs, terms.pinned_bytes) == (MOST_CAP, MOST_CAP)


async def test_the_greatest_cursors_that_a_request_can_hold_find_nothing(
    store: JobStore, tenant: Tenant
) -> None:
    lease = await running(store, tenant)
    await store.record_step(step(lease, 1))
    assert await store.steps(lease.job_id, after=2**32 - 1) == []
    assert await store.links(lease.job_id, 2**32 - 1) == ()
    assert await store.evaluations(lease.job_id, after=2**32 - 1) == []
    assert await store.events(lease.job_id, after=2**64 - 1) == []


async def test_a_step_of_billions_of_bytes_and_tokens_is_summed(store: JobStore, tenant: Tenant) -> None:
    lease = await running(store, tenant)
    for number in (1, 2):
        await store.record_step(step(lease, number, tokens=2**31 - 1))
    [used] = await store.accounts.usage_of_all()
    assert (used.tokens, type(used.tokens)) == (2**32 - 2, int)
    again = await store.grant_lease(lease.job_id, "device-2")
    assert (await store.rewind(again, 1)).tokens == 2**31 - 1
