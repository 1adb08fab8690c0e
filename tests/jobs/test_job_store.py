from __future__ import annotations

import asyncio

import pytest
from job_samples import HandClock, new_job, running
from sqlalchemy.exc import IntegrityError

from cola_runtime.errors import Conflict, InvalidInput, NotFound, Unavailable
from cola_runtime.jobs import schema
from cola_runtime.jobs.records import Tenant
from cola_runtime.jobs.state import JobState, Trigger
from cola_runtime.jobs.store import JobStore


async def test_a_new_job_is_queued_with_its_first_event(store: JobStore, tenant: Tenant) -> None:
    new = new_job(tenant)
    job = await store.create_job(new)
    assert (job.job_id, job.state, job.version, job.epoch) == (new.job_id, JobState.QUEUED, 0, 0)
    assert (job.tenant_name, job.created_at) == ("acme", "2026-01-02T03:04:05.000000Z")
    (event,) = await store.events(job.job_id)
    assert (event.kind, event.data) == ("job.queued", {"to": "queued", "total_steps": 5})


async def test_the_same_idempotency_key_fifty_times_at_once_makes_one_job(
    store: JobStore, tenant: Tenant
) -> None:
    requests = [store.create_job(new_job(tenant, idempotency_key="k")) for _ in range(50)]
    made = await asyncio.gather(*requests)
    assert len({job.job_id for job in made}) == 1
    assert len(await store.jobs()) == 1
    assert len(await store.events(made[0].job_id)) == 1


async def test_another_request_under_the_same_key_is_refused(store: JobStore, tenant: Tenant) -> None:
    await store.create_job(new_job(tenant, idempotency_key="k"))
    with pytest.raises(Conflict) as caught:
        await store.create_job(new_job(tenant, idempotency_key="k", digest="d2"))
    assert caught.value.reason == "IDEMPOTENCY_CONFLICT"
    assert len(await store.jobs()) == 1


async def test_idempotency_keys_of_two_tenants_are_independent(store: JobStore, tenant: Tenant) -> None:
    other = await store.create_tenant("other")
    mine = await store.create_job(new_job(tenant, idempotency_key="k"))
    theirs = await store.create_job(new_job(other, idempotency_key="k", digest="d2"))
    assert mine.job_id != theirs.job_id


async def test_another_tenants_job_does_not_exist(store: JobStore, tenant: Tenant) -> None:
    other = await store.create_tenant("other")
    job = await store.create_job(new_job(tenant))
    for attempt in (
        store.job(job.job_id, tenant_id=other.tenant_id),
        store.find_job(other.tenant_id, job.job_id),
        store.find_job(other.tenant_id, job.name),
        store.find_job(other.tenant_id, job.job_id[:8]),
    ):
        with pytest.raises(NotFound) as caught:
            await attempt
        assert caught.value.reason == "JOB_UNKNOWN"
    assert await store.jobs(tenant_id=other.tenant_id) == []
    with pytest.raises(InvalidInput, match="continue after"):
        await store.jobs(tenant_id=other.tenant_id, after=job.job_id)


async def test_a_job_is_found_by_id_name_or_prefix(store: JobStore, tenant: Tenant) -> None:
    job = await store.create_job(new_job(tenant, name="chat"))
    for ref in (job.job_id, "chat", job.job_id[:12]):
        assert await store.find_job(tenant.tenant_id, ref) == job


async def test_an_ambiguous_reference_names_the_candidates(store: JobStore, tenant: Tenant) -> None:
    first, second = [await store.create_job(new_job(tenant, name="chat")) for _ in range(2)]
    for ref in ("chat", "job-"):
        with pytest.raises(Conflict) as caught:
            await store.find_job(tenant.tenant_id, ref)
        assert caught.value.reason == "REFERENCE_AMBIGUOUS"
        assert first.job_id in caught.value.message
        assert second.job_id in caught.value.message


async def test_wildcards_in_a_reference_are_plain_text(store: JobStore, tenant: Tenant) -> None:
    await store.create_job(new_job(tenant))
    for ref in ("job-%", "job_", "%"):
        with pytest.raises(NotFound):
            await store.find_job(tenant.tenant_id, ref)


async def test_pages_of_jobs_are_newest_first_without_gap_or_repeat(
    store: JobStore, tenant: Tenant, hand_clock: HandClock
) -> None:
    made = []
    for number in range(7):
        made.append((await store.create_job(new_job(tenant, name=f"job{number}"))).job_id)
        hand_clock.forward(seconds=number % 2)  # some share their moment
    seen: list[str] = []
    while page := await store.jobs(tenant_id=tenant.tenant_id, limit=2, after=seen[-1] if seen else None):
        seen += [job.job_id for job in page]
    assert sorted(seen) == sorted(made)
    times = [(await store.job(job_id)).created_at for job_id in seen]
    assert times == sorted(times, reverse=True)


async def test_jobs_are_filtered_by_state(store: JobStore, tenant: Tenant) -> None:
    lease = await running(store, tenant)
    await store.create_job(new_job(tenant))
    assert [job.job_id for job in await store.jobs(states=[JobState.RUNNING])] == [lease.job_id]
    assert await store.jobs(states=[JobState.FAILED]) == []


async def test_each_transition_is_one_event(store: JobStore, tenant: Tenant) -> None:
    job = await store.create_job(new_job(tenant))
    triggers = [Trigger.START, Trigger.PAUSE, Trigger.RESUME, Trigger.START, Trigger.CANCEL]
    for trigger in triggers:
        await store.transition(job.job_id, trigger)
    events = await store.events(job.job_id)
    kinds = [event.kind.removeprefix("job.") for event in events]
    assert kinds == ["queued", "running", "paused", "queued", "running", "cancelled"]
    assert [event.data.get("trigger") for event in events] == [None, *triggers]


async def test_times_of_a_jobs_life(store: JobStore, tenant: Tenant, hand_clock: HandClock) -> None:
    job = await store.create_job(new_job(tenant))
    for trigger in (Trigger.START, Trigger.REQUEUE, Trigger.START, Trigger.COMPLETE):
        hand_clock.forward(seconds=1)
        job = await store.transition(job.job_id, trigger)
    assert job.started_at == "2026-01-02T03:04:06.000000Z"
    assert job.finished_at == "2026-01-02T03:04:09.000000Z"
    assert job.ended


async def test_an_illegal_transition_changes_nothing(store: JobStore, tenant: Tenant) -> None:
    job = await store.create_job(new_job(tenant))
    done = await store.transition(job.job_id, Trigger.CANCEL)
    events = await store.events(job.job_id)
    with pytest.raises(Conflict) as caught:
        await store.transition(job.job_id, Trigger.START)
    assert caught.value.reason == "TRANSITION_ILLEGAL"
    assert await store.job(job.job_id) == done
    assert await store.events(job.job_id) == events


async def test_a_failed_job_says_why(store: JobStore, tenant: Tenant) -> None:
    lease = await running(store, tenant)
    job = await store.transition(
        lease.job_id, Trigger.FAIL, failure_reason="LOSS_DIVERGED", failure_message="loss is 1e9 at step 3"
    )
    assert (job.failure_reason, job.failure_message) == ("LOSS_DIVERGED", "loss is 1e9 at step 3")
    event = (await store.events(job.job_id))[-1]
    assert (event.level, event.message, event.data["reason"]) == (
        "error",
        "loss is 1e9 at step 3",
        "LOSS_DIVERGED",
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"state": "dreaming"},
        {"state": "succeeded"},
        {"finished_at": "2026-01-02T03:04:05.000000Z"},
        {"failure_reason": "WHY"},
        {"version": 6},
        {"version": -1},
        {"total_steps": 0},
        {"epoch": -1},
        {"state": "paused", "device_id": "device-1"},
        {"tenant_id": "nobody"},
    ],
)
async def test_the_database_refuses_a_job_that_cannot_be(
    store: JobStore, tenant: Tenant, wrong: dict[str, object]
) -> None:
    job = await store.create_job(new_job(tenant))
    update = schema.jobs.update().values(**wrong)
    with pytest.raises(Unavailable) as caught:
        await store._database.run(lambda c: c.execute(update))
    assert isinstance(caught.value.__cause__, IntegrityError)
    assert caught.value.reason == "STORE_REFUSED"
    assert await store.job(job.job_id) == job


async def test_a_second_process_is_kept_out(
    store: JobStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cola_runtime.jobs.database.BUSY_TIMEOUT_MILLISECONDS", 10)
    with pytest.raises(Unavailable) as caught:
        await JobStore.open(url)
    assert caught.value.reason == "STORE_BUSY"


async def test_a_closed_store_says_so(store: JobStore) -> None:
    await store.close()
    await store.close()
    with pytest.raises(Unavailable) as caught:
        await store.tenants()
    assert caught.value.reason == "STORE_CLOSED"
