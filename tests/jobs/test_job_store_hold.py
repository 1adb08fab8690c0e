"""On PostgreSQL one coordinator writes, every commit has one outcome, and a lost server is waited out."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest
from job_samples import new_job, running, step

from cola_runtime.errors import InvalidInput, NotFound, Unavailable
from cola_runtime.jobs.database import Database
from cola_runtime.jobs.state import JobState, Trigger
from cola_runtime.jobs.store import JobStore
from cola_runtime.runtime.coordinator import until_stopped
from cola_runtime.scheduler.patience import until_available
from tests.lossy_wire import Cut, LossyWire
from tests.postgres import TEMPLATE, PostgresServer


@pytest.fixture
def url(postgres: PostgresServer) -> Iterator[str]:
    made = postgres.new_database(template=TEMPLATE)
    yield made
    postgres.drop(made)


@pytest.fixture
async def wire(url: str) -> AsyncIterator[tuple[LossyWire, JobStore]]:
    """A store behind a wire that can be cut."""
    async with LossyWire.to(url) as (wire, behind):
        store = await JobStore.open(behind)
        yield wire, store
        await store.close()


async def test_a_session_that_the_server_ended_is_replaced_before_the_next_call_fails(
    store: JobStore, url: str, postgres: PostgresServer
) -> None:
    tenant = await store.create_tenant("acme")
    assert postgres.end_sessions(url) == 1
    job = await store.create_job(new_job(tenant))
    assert postgres.end_sessions(url) == 1
    assert await store.job(job.job_id) == job


async def test_who_was_cut_off_while_another_took_the_store_writes_no_more(
    store: JobStore, url: str, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cola_runtime.jobs.database.BUSY_TIMEOUT_MILLISECONDS", 10)
    tenant = await store.create_tenant("acme")
    postgres.end_sessions(url)
    other = await JobStore.open(url)
    job = await other.create_job(new_job(tenant))
    told = asyncio.create_task(store.taken_over())
    for _ in range(2):  # while the other one runs, and when it has ended
        with pytest.raises(Unavailable) as caught:
            await until_available(lambda: store.transition(job.job_id, Trigger.CANCEL))
        assert caught.value.reason == "STORE_TAKEN_OVER"
        await other.close()
    await asyncio.wait_for(told, 5)
    with pytest.raises(Unavailable, match="another coordinator"):
        await until_stopped(asyncio.Event(), store)
    again = await JobStore.open(url)
    assert (await again.job(job.job_id)).state is JobState.QUEUED
    await again.close()


async def test_who_was_cut_off_alone_goes_on(store: JobStore, url: str, postgres: PostgresServer) -> None:
    lease = await running(store, await store.create_tenant("acme"))
    for number in (1, 2, 3):
        postgres.end_sessions(url)
        await store.record_step(step(lease, number))
    assert (await store.job(lease.job_id)).version == 3


@pytest.mark.parametrize("cut", Cut)
async def test_a_commit_whose_answer_is_lost_is_made_once_or_not_at_all(
    cut: Cut, wire: tuple[LossyWire, JobStore]
) -> None:
    """The event has no key by which the store could tell that it is the same one again."""
    line, store = wire
    job = await store.create_job(new_job(await store.create_tenant("acme")))
    last = (await store.events(job.job_id))[-1].id
    watch = asyncio.create_task(store.watch(job.job_id, after=last).news(timeout_seconds=30))
    await asyncio.sleep(0)
    await store.tenants()  # behind the watcher's look, which is a transaction, too
    line.cut = cut
    if cut is Cut.COMMIT:
        with pytest.raises(Unavailable) as caught:
            await store.add_event(job.job_id, "note", "once")
        assert caught.value.reason == "STORE_UNREACHABLE"
    else:
        assert (await store.add_event(job.job_id, "note", "once")).id > last
        assert (await asyncio.wait_for(watch, 5)).events
    watch.cancel()
    noted = [event for event in await store.events(job.job_id) if event.kind == "note"]
    assert len(noted) == (cut is Cut.ANSWER)


@pytest.mark.parametrize("cut", Cut)
async def test_a_transition_that_is_waited_out_over_a_lost_commit_happens_once(
    cut: Cut, wire: tuple[LossyWire, JobStore]
) -> None:
    """Made a second time it would be illegal, and its job would fail."""
    line, store = wire
    job = await store.create_job(new_job(await store.create_tenant("acme")))
    line.cut = cut
    moved = await until_available(lambda: store.transition(job.job_id, Trigger.START))
    assert moved.state is JobState.RUNNING
    assert [event.kind for event in await store.events(job.job_id)] == ["job.queued", "job.running"]


async def test_a_crash_of_the_server_fails_what_is_asked_and_keeps_what_was_committed(
    store: JobStore, postgres: PostgresServer
) -> None:
    lease = await running(store, await store.create_tenant("acme"))
    await store.record_step(step(lease, 1))
    postgres.stop("immediate")
    try:
        for _ in range(2):
            with pytest.raises(Unavailable) as caught:
                await store.record_step(step(lease, 2))
            assert caught.value.reason == "STORE_UNREACHABLE"
        waiting = asyncio.create_task(until_available(lambda: store.record_step(step(lease, 2))))
        await asyncio.sleep(0.5)
        assert not waiting.done()
    finally:
        postgres.start()
    assert (await asyncio.wait_for(waiting, 30)).version == 2
    assert [each.step for each in await store.steps(lease.job_id)] == [1, 2]


async def test_what_postgresql_cannot_hold_is_refused_or_not_found(store: JobStore) -> None:
    tenant = await store.create_tenant("acme")
    with pytest.raises(InvalidInput) as caught:
        await store.create_job(replace(new_job(tenant), training_name="a\0b"))
    assert caught.value.reason == "VALUE_NOT_STORABLE"
    with pytest.raises(NotFound):
        await store.find_job(tenant.tenant_id, "a\0b")


async def test_a_query_that_fails_without_an_outage_of_the_server_says_so(store: JobStore) -> None:
    with pytest.raises(Unavailable) as caught:
        await store._database.run(lambda c: c.exec_driver_sql("SELECT 1 / 0 FROM nothing"))
    assert caught.value.reason == "STORE_FAILED"


async def test_the_password_is_in_no_error_and_no_log(
    postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for url in (
        "postgresql://cola:hunter2@127.0.0.1:1/none",
        f"postgresql://nobody:hunter2@127.0.0.1:{postgres.port}/none",
    ):
        with pytest.raises(Unavailable) as caught:
            await JobStore.open(url)
        assert caught.value.reason == "STORE_UNREACHABLE"
        causes = [caught.value, caught.value.__cause__, caught.value.__context__]
        assert "hunter2" not in "".join(map(repr, causes)) + "".join(map(str, causes)) + caplog.text


async def test_without_the_driver_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InvalidInput) as caught:
        Database("postgresql://cola@127.0.0.1/none")
    assert caught.value.reason == "DATABASE_DRIVER_MISSING"
    assert "cola_runtime[postgres]" in caught.value.remedy
