"""A job's deadline: from its creation, missed once, and not by a job that has ended."""

from __future__ import annotations

from dataclasses import replace

from job_samples import HandClock, new_job, running

from cola_runtime.jobs.records import Tenant
from cola_runtime.jobs.state import JobState, Trigger
from cola_runtime.jobs.store import JobStore


async def test_a_deadline_counts_from_the_jobs_creation_and_is_missed_once(
    store: JobStore, tenant: Tenant, hand_clock: HandClock
) -> None:
    job = await store.create_job(replace(new_job(tenant), deadline_seconds=90.0))
    assert (job.created_at, job.deadline_at) == ("2026-01-02T03:04:05.000000Z", "2026-01-02T03:05:35.000000Z")
    hand_clock.forward(seconds=91.0)
    missed = await store.miss_deadline(job.job_id)
    assert missed is not None
    assert (missed.state, missed.deadline_missed_at) == (JobState.QUEUED, "2026-01-02T03:05:36.000000Z")
    assert await store.miss_deadline(job.job_id) is None
    kinds = [(event.kind, event.level) for event in await store.events(job.job_id)]
    assert kinds == [("job.queued", "info"), ("job.deadline_missed", "warning")]


async def test_a_job_that_has_ended_or_has_no_deadline_misses_none(store: JobStore, tenant: Tenant) -> None:
    ended = await store.create_job(replace(new_job(tenant), deadline_seconds=90.0))
    await store.transition(ended.job_id, Trigger.CANCEL)
    free = await running(store, tenant)
    assert await store.miss_deadline(ended.job_id) is None
    assert await store.miss_deadline(free.job_id) is None
