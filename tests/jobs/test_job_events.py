from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from job_samples import new_job, running, step
from sqlalchemy import Connection

from cola_runtime.errors import NotFound, Unavailable
from cola_runtime.jobs.records import EventRecord, Tenant
from cola_runtime.jobs.state import Trigger
from cola_runtime.jobs.store import JobStore
from cola_runtime.jobs.trail import append_event
from cola_runtime.jobs.watch import News


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


def news(store: JobStore, job_id: str, *, after: int, timeout_seconds: float) -> asyncio.Task[News]:
    return asyncio.create_task(store.watch(job_id, after=after).news(timeout_seconds=timeout_seconds))


async def test_a_commit_wakes_a_watcher_at_once(store: JobStore, tenant: Tenant) -> None:
    lease = await running(store, tenant)
    last = (await store.events(lease.job_id))[-1].id
    watch = news(store, lease.job_id, after=last, timeout_seconds=30)
    await asyncio.sleep(0.05)
    assert not watch.done()
    await store.record_step(step(lease, 1))
    told = await asyncio.wait_for(watch, 1)
    assert [event.kind for event in told.events] == ["step.applied"] and not told.ended


async def test_an_event_that_is_there_already_needs_no_wait(store: JobStore, tenant: Tenant) -> None:
    job = await store.create_job(new_job(tenant))
    told = await news(store, job.job_id, after=0, timeout_seconds=0)
    assert [event.kind for event in told.events] == ["job.queued"]


async def test_another_jobs_event_does_not_end_a_wait_and_the_deadline_does(
    store: JobStore, tenant: Tenant
) -> None:
    mine, other = [await store.create_job(new_job(tenant)) for _ in range(2)]
    last = (await store.events(mine.job_id))[-1].id
    began = time.monotonic()
    watch = news(store, mine.job_id, after=last, timeout_seconds=0.1)
    await store.add_event(other.job_id, "note", "for another")
    assert await watch == News([], ended=False)
    assert 0.09 < time.monotonic() - began < 1


async def test_a_refused_write_wakes_nobody(store: JobStore, tenant: Tenant) -> None:
    lease = await running(store, tenant)
    last = (await store.events(lease.job_id))[-1].id
    watch = news(store, lease.job_id, after=last, timeout_seconds=0.1)
    with pytest.raises(NotFound):
        await store.add_event("job-0", "note", "to nobody")
    assert await watch == News([], ended=False)


async def test_a_watcher_is_told_all_pages_without_a_wait_and_the_end_once_nothing_is_left(
    store: JobStore, tenant: Tenant
) -> None:
    job = await store.create_job(new_job(tenant))
    for number in range(3):
        await store.add_event(job.job_id, "note", f"{number}")
    await store.transition(job.job_id, Trigger.CANCEL)
    watch = store.watch(job.job_id, page=2)
    async with asyncio.timeout(5):
        pages = [await watch.news(timeout_seconds=30) for _ in range(4)]
    kinds = [[event.kind for event in page.events] for page in pages]
    assert kinds == [["job.queued", "note"], ["note", "note"], ["job.cancelled"], []]
    assert pages[-1].ended


async def test_the_database_is_asked_once_for_a_commit_and_not_during_a_silence(
    store: JobStore, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = await running(store, tenant)
    watch = store.watch(lease.job_id)
    await watch.news(timeout_seconds=0)
    asked: list[object] = []
    run = store._database.run

    async def counted(work: Any) -> Any:
        asked.append(work)
        return await run(work)

    await store.record_step(step(lease, 1))
    monkeypatch.setattr(watch._database, "run", counted)
    assert len((await watch.news(timeout_seconds=30)).events) == 1
    assert await watch.news(timeout_seconds=0.05) == News([], ended=False)
    assert len(asked) == 1


async def test_a_watcher_whose_look_failed_looks_again(
    store: JobStore, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing need be committed after an outage for what was committed before it to be told."""
    job = await store.create_job(new_job(tenant))
    watch = store.watch(job.job_id)

    async def fail(_work: object) -> Any:
        raise Unavailable("STORE_UNREACHABLE", "away")

    with monkeypatch.context() as patched:
        patched.setattr(watch._database, "run", fail)
        with pytest.raises(Unavailable):
            await watch.news(timeout_seconds=30)
    told = await asyncio.wait_for(watch.news(timeout_seconds=30), 1)
    assert [event.kind for event in told.events] == ["job.queued"]


async def test_a_cancelled_writer_still_wakes_the_watchers(store: JobStore, tenant: Tenant) -> None:
    job = await store.create_job(new_job(tenant))
    last = (await store.events(job.job_id))[-1].id
    began, finish = threading.Event(), threading.Event()

    def write_slowly(connection: Connection) -> EventRecord:
        began.set()
        finish.wait(5)
        return append_event(connection, job.job_id, at="now", kind="note", message="late")

    watch = news(store, job.job_id, after=last, timeout_seconds=2)
    await asyncio.sleep(0.05)  # the watcher has looked, found nothing and waits
    writer = asyncio.create_task(store._writes.run("event", job.job_id, write_slowly))
    await asyncio.to_thread(began.wait, 5)
    writer.cancel()
    await asyncio.sleep(0)
    finish.set()
    assert [event.message for event in (await watch).events] == ["late"]
    assert writer.cancelled()
