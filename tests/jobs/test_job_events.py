from __future__ import annotations

import asyncio
import threading
import time

import pytest
from job_samples import new_job, running, step
from sqlalchemy import Connection

from cola_runtime.errors import NotFound
from cola_runtime.jobs.records import EventRecord, Tenant
from cola_runtime.jobs.store import JobStore
from cola_runtime.jobs.trail import append_event


async def test_event_ids_grow_over_all_jobs_and_pages_have_no_gap(store: JobStore, tenant: Tenant) -> None:
    first, second = [await store.create_job(new_job(tenant)) for _ in range(2)]
    added = [
        (await store.add_event(job.job_id, "note", f"{number}", data={"n": number})).id
        for number in range(4)
        for job in (first, second)
    ]
    assert added == sorted(set(added))
    seen = []
    last = 0
    while page := await store.events(first.job_id, after=last, limit=2):
        seen += [event.message for event in page]
        last = page[-1].id
    assert seen[1:] == ["0", "1", "2", "3"]


async def test_an_event_needs_a_job(store: JobStore, tenant: Tenant) -> None:
    with pytest.raises(NotFound):
        await store.add_event("job-0", "note", "to nobody")


async def test_a_commit_wakes_a_watcher_at_once(store: JobStore, tenant: Tenant) -> None:
    lease = await running(store, tenant)
    last = (await store.events(lease.job_id))[-1].id
    watch = asyncio.create_task(store.changed(lease.job_id, after=last, timeout_seconds=30))
    await asyncio.sleep(0.05)
    assert not watch.done()
    await store.record_step(step(lease, 1))
    assert await asyncio.wait_for(watch, 1)


async def test_an_event_that_is_there_already_needs_no_wait(store: JobStore, tenant: Tenant) -> None:
    job = await store.create_job(new_job(tenant))
    assert await store.changed(job.job_id, after=0, timeout_seconds=0)


async def test_another_jobs_event_does_not_end_a_wait_and_the_deadline_does(
    store: JobStore, tenant: Tenant
) -> None:
    mine, other = [await store.create_job(new_job(tenant)) for _ in range(2)]
    last = (await store.events(mine.job_id))[-1].id
    began = time.monotonic()
    watch = asyncio.create_task(store.changed(mine.job_id, after=last, timeout_seconds=0.1))
    await store.add_event(other.job_id, "note", "for another")
    assert await watch is False
    assert 0.09 < time.monotonic() - began < 1


async def test_a_refused_write_wakes_nobody(store: JobStore, tenant: Tenant) -> None:
    lease = await running(store, tenant)
    last = (await store.events(lease.job_id))[-1].id
    watch = asyncio.create_task(store.changed(lease.job_id, after=last, timeout_seconds=0.1))
    with pytest.raises(NotFound):
        await store.add_event("job-0", "note", "to nobody")
    assert await watch is False


async def test_a_cancelled_writer_still_wakes_the_watchers(store: JobStore, tenant: Tenant) -> None:
    job = await store.create_job(new_job(tenant))
    last = (await store.events(job.job_id))[-1].id
    began, finish = threading.Event(), threading.Event()

    def write_slowly(connection: Connection) -> EventRecord:
        began.set()
        finish.wait(5)
        return append_event(connection, job.job_id, at="now", kind="note", message="late")

    watch = asyncio.create_task(store.changed(job.job_id, after=last, timeout_seconds=2))
    await asyncio.sleep(0.05)  # the watcher has looked, found nothing and waits
    writer = asyncio.create_task(store._writes.run("event", job.job_id, write_slowly))
    await asyncio.to_thread(began.wait, 5)
    writer.cancel()
    await asyncio.sleep(0)
    finish.set()
    assert await watch
    assert writer.cancelled()
