"""Every state with every trigger: the store does what the table says, with one event; else nothing."""

from __future__ import annotations

import pytest
from job_samples import new_job, step

from cola_runtime.errors import Conflict
from cola_runtime.jobs.records import JobRecord, Tenant
from cola_runtime.jobs.state import (
    ACTIVE_STATES,
    INITIAL_STATE,
    TERMINAL_STATES,
    TRANSITIONS,
    JobState,
    Trigger,
    next_state,
)
from cola_runtime.jobs.store import JobStore

# Written out a second time on purpose: a change of the machine must be meant.
EXPECTED = {
    ("queued", "start"): "running",
    ("queued", "pause"): "paused",
    ("queued", "fail"): "failed",
    ("queued", "cancel"): "cancelled",
    ("running", "requeue"): "queued",
    ("running", "pause"): "paused",
    ("running", "complete"): "succeeded",
    ("running", "stop_early"): "succeeded",
    ("running", "fail"): "failed",
    ("running", "cancel"): "cancelled",
    ("paused", "resume"): "queued",
    ("paused", "cancel"): "cancelled",
}
WAY_TO = {
    JobState.QUEUED: [],
    JobState.RUNNING: [Trigger.START],
    JobState.PAUSED: [Trigger.PAUSE],
    JobState.SUCCEEDED: [Trigger.START, Trigger.COMPLETE],
    JobState.FAILED: [Trigger.FAIL],
    JobState.CANCELLED: [Trigger.CANCEL],
}


async def in_state(store: JobStore, tenant: Tenant, state: JobState) -> JobRecord:
    job = await store.create_job(new_job(tenant))
    for trigger in WAY_TO[state]:
        job = await store.transition(job.job_id, trigger)
    assert job.state is state
    return job


@pytest.mark.parametrize("state", list(JobState))
async def test_the_store_does_what_the_table_says_and_nothing_else(
    store: JobStore, tenant: Tenant, state: JobState
) -> None:
    for trigger in Trigger:
        job = await in_state(store, tenant, state)
        expected = EXPECTED.get((state.value, trigger.value))
        if expected is None:
            await refused(store, job, trigger)
        else:
            await moved(store, job, trigger, expected)


async def refused(store: JobStore, job: JobRecord, trigger: Trigger) -> None:
    events = await store.events(job.job_id)
    with pytest.raises(Conflict) as caught:
        await store.transition(job.job_id, trigger)
    assert (caught.value.reason, caught.value.actual) == ("TRANSITION_ILLEGAL", job.state)
    assert await store.job(job.job_id) == job
    assert await store.events(job.job_id) == events


async def moved(store: JobStore, job: JobRecord, trigger: Trigger, expected: str) -> None:
    events = await store.events(job.job_id)
    after = await store.transition(job.job_id, trigger)
    assert after.state == expected == next_state(job.state, trigger)
    (event,) = (await store.events(job.job_id))[len(events) :]
    assert event.kind == f"job.{expected}"
    assert (event.data["from"], event.data["to"], event.data["trigger"]) == (job.state, expected, trigger)


@pytest.mark.parametrize("state", list(JobState))
async def test_only_an_active_job_takes_a_lease_and_only_a_running_one_a_step(
    store: JobStore, tenant: Tenant, state: JobState
) -> None:
    job = await in_state(store, tenant, state)
    if state not in ACTIVE_STATES:
        with pytest.raises(Conflict, match="takes no lease"):
            await store.grant_lease(job.job_id, "device-1")
        return
    lease = await store.grant_lease(job.job_id, "device-1")
    if state is JobState.RUNNING:
        assert (await store.record_step(step(lease, 1))).version == 1
        return
    with pytest.raises(Conflict, match="takes no step"):
        await store.record_step(step(lease, 1))


def test_the_table_is_complete_and_its_ends_are_ends() -> None:
    assert set(TRANSITIONS) == set(JobState)
    assert {state for state, possible in TRANSITIONS.items() if not possible} == TERMINAL_STATES
    assert {trigger for possible in TRANSITIONS.values() for trigger in possible} == set(Trigger)


def test_every_state_is_reachable_and_none_follows_itself() -> None:
    reached = {INITIAL_STATE}
    for _ in JobState:
        reached |= {after for state in reached for after in TRANSITIONS[state].values()}
    assert reached == set(JobState)
    assert all(state not in possible.values() for state, possible in TRANSITIONS.items())
