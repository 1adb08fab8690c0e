"""What is counted for a tenant: each recorded step and evaluation once, whatever is repeated."""

from __future__ import annotations

from dataclasses import replace

from job_samples import evaluation, running, step

from cola_runtime.jobs.records import Tenant, Usage
from cola_runtime.jobs.store import JobStore


async def test_usage_is_what_all_jobs_of_the_tenant_have_recorded(store: JobStore, tenant: Tenant) -> None:
    other = await store.create_tenant("other")
    for owner in (tenant, tenant, other):
        lease = await running(store, owner)
        held_out = replace(evaluation(lease, 0), tokens=7, base_seconds=0.5)
        await store.record_evaluation(held_out)
        await store.record_evaluation(held_out)  # a repeated message
        for number in (1, 2):
            await store.record_step(step(lease, number))
        await store.record_step(step(lease, 2))  # a repeated message
    of_other = Usage(
        tenant="other",
        jobs=1,
        steps=2,
        repeated_steps=0,
        tokens=20,
        label_tokens=10,
        evaluation_tokens=7,
        base_seconds=1.0,
        device_seconds=0.25,
        bytes_up=200,
        bytes_down=100,
    )
    assert await store.accounts.usage(other.tenant_id) == of_other
    assert [each.tenant for each in await store.accounts.usage_of_all()] == ["acme", "other"]
    assert (await store.accounts.usage(tenant.tenant_id)).tokens == 40


async def test_steps_that_are_made_again_count_once_but_their_seconds_and_bytes_were_spent(
    store: JobStore, tenant: Tenant
) -> None:
    lease = await running(store, tenant)
    await store.record_step(step(lease, 1))
    await store.record_step(step(lease, 2))
    await store.record_evaluation(replace(evaluation(lease, 2), tokens=7, base_seconds=0.5))
    lease = await store.grant_lease(lease.job_id, "device-2")
    await store.rewind(lease, 1)
    rewound = await store.accounts.usage(tenant.tenant_id)
    assert (rewound.steps, rewound.repeated_steps, rewound.tokens, rewound.evaluation_tokens) == (1, 1, 10, 0)
    await store.record_step(step(lease, 2))
    again = await store.accounts.usage(tenant.tenant_id)
    assert (again.steps, again.repeated_steps, again.tokens) == (2, 1, 20)
    assert (again.base_seconds, again.bytes_up) == (3 * 0.25 + 0.5, 300)


async def test_a_tenant_without_jobs_has_used_nothing(store: JobStore, tenant: Tenant) -> None:
    found = await store.accounts.usage(tenant.tenant_id)
    assert (found.jobs, found.tokens, found.base_seconds) == (0, 0, 0.0)
