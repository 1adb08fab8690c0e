"""A version is evaluated once, a rewind takes that back, and a job's held-out losses follow from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from job_samples import evaluation, running, step

from cola_runtime.errors import Conflict, Fenced, InvalidInput
from cola_runtime.jobs.records import Tenant
from cola_runtime.jobs.state import JobState
from cola_runtime.jobs.store import JobStore


async def test_a_version_is_evaluated_once(store: JobStore, tenant: Tenant) -> None:
    lease = await running(store, tenant)
    first = await store.record_evaluation(evaluation(lease, 0))
    assert first == replace(evaluation(lease, 0), created_at="2026-01-02T03:04:05.000000Z")
    assert await store.record_evaluation(evaluation(lease, 0, loss=9.0)) == first
    assert await store.evaluations(lease.job_id) == [first]
    (event,) = [each for each in await store.events(lease.job_id) if each.kind == "evaluation.done"]
    assert event.message == "held-out rows at step 0: loss 2.0000, perplexity 9.5000, the best so far"
    assert event.data == {
        "step": 0,
        "epoch": 1,
        "metrics": {"loss": 2.0, "perplexity": 9.5},
        "primary": "loss",
        "greater_is_better": False,
        "improved": True,
    }


@pytest.mark.parametrize("other", [-1, 0, 2])
async def test_only_the_jobs_own_version_is_evaluated(store: JobStore, tenant: Tenant, other: int) -> None:
    lease = await running(store, tenant)
    await store.record_step(step(lease, 1))
    with pytest.raises(Conflict) as caught:
        await store.record_evaluation(evaluation(lease, other))
    assert caught.value.reason == "EVALUATION_OUT_OF_ORDER"
    assert await store.evaluations(lease.job_id) == []


async def test_an_evaluation_under_an_older_lease_is_fenced(store: JobStore, tenant: Tenant) -> None:
    old = await running(store, tenant)
    await store.grant_lease(old.job_id, "device-2")
    with pytest.raises(Fenced):
        await store.record_evaluation(evaluation(old, 0))


async def test_an_evaluation_needs_finite_numbers(store: JobStore, tenant: Tenant) -> None:
    lease = await running(store, tenant)
    with pytest.raises(InvalidInput) as caught:
        await store.record_evaluation(evaluation(lease, 0, loss=float("nan")))
    assert caught.value.reason == "METRIC_NOT_FINITE"


async def test_a_rewind_takes_evaluations_and_the_best_of_them_back(store: JobStore, tenant: Tenant) -> None:
    old = await running(store, tenant)
    for number, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        await store.record_step(step(old, number))
        await store.record_evaluation(evaluation(old, number, loss=loss, improved=loss != 2.0))
    best = await store.best_evaluation(old.job_id)
    assert best is not None and best.step == 2
    lease = await store.grant_lease(old.job_id, "device-2")
    job = await store.rewind(lease, 1)
    assert [each.step for each in await store.evaluations(old.job_id)] == [1]
    best = await store.best_evaluation(old.job_id)
    assert best is not None and (best.step, best.value) == (1, 3.0)
    assert job.evaluation_loss_after == 3.0
    await store.record_step(step(lease, 2))
    again = await store.record_evaluation(evaluation(lease, 2, loss=1.0))
    assert (again.epoch, len(await store.evaluations(old.job_id))) == (2, 2)


async def test_held_out_losses_of_a_job_are_its_first_and_its_newest(store: JobStore, tenant: Tenant) -> None:
    lease = await running(store, tenant)
    job = await store.job(lease.job_id)
    assert (job.evaluation_loss_before, job.evaluation_loss_after) == (None, None)
    await store.record_evaluation(evaluation(lease, 0, loss=3.5))
    for number, loss in ((1, 2.25), (2, 2.5)):
        await store.record_step(step(lease, number))
        await store.record_evaluation(evaluation(lease, number, loss=loss))
    job = await store.job(lease.job_id)
    assert (job.evaluation_loss_before, job.evaluation_loss_after) == (3.5, 2.5)
    assert await store.jobs(tenant_id=tenant.tenant_id) == [job]


async def test_evaluations_are_read_in_pages(store: JobStore, tenant: Tenant) -> None:
    lease = await running(store, tenant)
    await store.record_evaluation(evaluation(lease, 0))
    for number in (1, 2):
        await store.record_step(step(lease, number))
        await store.record_evaluation(evaluation(lease, number))
    assert [each.step for each in await store.evaluations(lease.job_id, limit=2)] == [0, 1]
    assert [each.step for each in await store.evaluations(lease.job_id, after=1, limit=2)] == [2]


async def test_a_job_that_stops_early_has_succeeded_and_says_why(store: JobStore, tenant: Tenant) -> None:
    lease = await running(store, tenant)
    await store.record_step(step(lease, 1))
    job = await store.stop_early(lease.job_id, "stopped early at step 1", data={"best_step": 1})
    assert (job.state, job.version, job.total_steps, job.device_id) == (JobState.SUCCEEDED, 1, 5, None)
    stopped, ended = (await store.events(lease.job_id))[-2:]
    assert (stopped.kind, stopped.data) == ("job.stopped_early", {"best_step": 1})
    assert (ended.kind, ended.message) == ("job.succeeded", "stopped early at step 1")
