"""More jobs than a page holds."""

from __future__ import annotations

import pytest
from job_samples import HandClock, new_job

from cola_runtime.jobs import job_rows
from cola_runtime.jobs.records import Tenant
from cola_runtime.jobs.state import JobState, Trigger
from cola_runtime.jobs.store import JobStore


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_rows, "MAX_LISTED_JOBS", 3)


async def test_all_jobs_of_a_state_come_oldest_first(
    store: JobStore, tenant: Tenant, hand_clock: HandClock
) -> None:
    """So every one is taken up when a coordinator starts, in the order in which they came."""
    made = []
    for number in range(8):
        hand_clock.forward(seconds=1)
        made.append((await store.create_job(new_job(tenant, name=f"job-{number}"))).job_id)
    await store.transition(made[2], Trigger.CANCEL)
    assert [job.job_id for job in await store.all_jobs(JobState.QUEUED)] == made[:2] + made[3:]
    assert [job.job_id for job in await store.all_jobs(JobState.CANCELLED)] == made[2:3]
    assert await store.all_jobs(JobState.RUNNING) == []


async def test_active_jobs_are_counted(store: JobStore, tenant: Tenant) -> None:
    other = await store.create_tenant("other")
    made = [await store.create_job(new_job(tenant, name=f"job-{number}")) for number in range(5)]
    keyed = await store.create_job(new_job(tenant, idempotency_key="k"))
    await store.transition(made[0].job_id, Trigger.CANCEL)
    assert await store.active_jobs(tenant.tenant_id) == 5
    assert await store.active_jobs(tenant.tenant_id, but_key="another") == 5
    assert await store.active_jobs(tenant.tenant_id, but_key="k") is None
    await store.transition(keyed.job_id, Trigger.CANCEL)
    assert await store.active_jobs(tenant.tenant_id, but_key="k") is None, "also of a job that has ended"
    assert await store.active_jobs(other.tenant_id, but_key="k") == 0
