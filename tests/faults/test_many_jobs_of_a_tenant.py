"""Ten thousand jobs of one tenant wait, and another tenant's job does not feel them."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import pytest

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.errors import QuotaExceeded
from cola_runtime.runtime.coordinator import RunningService
from cola_runtime.spec import JobSpec
from cola_runtime.testing.exactness import service_for, tenant_client
from cola_runtime.testing.in_process import running_in_process
from tests.faults.judging import MODEL, WAIT_SECONDS, fault_job

pytestmark = pytest.mark.many_jobs  # eight minutes, and no fault

JOBS = 10_000
AT_ONCE = 8
FEW = 50  # that may end before all are taken up again
TAKEN_UP_SECONDS = 600.0
SLOWER = 2.0  # that another tenant's job may be by the waiting jobs


def short(number: int) -> JobSpec:
    return JobSpec(name=f"job-{number:05}", base_model=MODEL, steps=1, rows_per_step=1)


def endless() -> JobSpec:
    """It keeps the tenant's one place."""
    return fault_job(steps=1_000_000, checkpoint_every=1_000_000).spec


async def seconds_of_a_job(client: AsyncClient, name: str) -> float:
    """From submission to success."""
    began = time.monotonic()
    spec = fault_job(steps=40).spec.model_copy(update={"name": name})
    await (await client.submit(spec, training=fault_job().training)).wait(WAIT_SECONDS)
    return time.monotonic() - began


async def submit_all(client: AsyncClient, rows: bytes) -> None:
    """All but one, so many calls at a time."""
    numbers = iter(range(1, JOBS))

    async def submit() -> None:
        for number in numbers:
            await client.submit(short(number), training=rows)

    await asyncio.gather(*(submit() for _ in range(AT_ONCE)))


async def client_of_many(service: RunningService, *, operator: str) -> AsyncClient:
    """By a new tenant, who may have keys made."""
    async with await tenant_client(service, operator) as operators:
        made = await operators.create_key("many", concurrent_jobs=1)
    return AsyncClient(base_url=f"grpc://{service.endpoint}", api_key=made.key)


async def in_line(client: AsyncClient, name: str, *, behind: int) -> None:
    """Return when the job says that at least so many wait before it."""
    handle, deadline = await client.job(name), time.monotonic() + TAKEN_UP_SECONDS
    while True:
        reason = (await handle.refresh()).waiting_reason
        found = re.search(r"(\d+) wait before it", reason)
        if found is not None and int(found[1]) >= behind:
            return
        assert time.monotonic() < deadline, (handle.job.state, reason)
        await asyncio.sleep(0.5)


@pytest.mark.timeout(2400)
async def test_ten_thousand_jobs_of_one_tenant_slow_nobody_elses(model: Path, tmp_path: Path) -> None:
    settings = service_for(tmp_path, model=model, name=MODEL, dtype="float32").model_copy(
        update={"active_jobs": JOBS}
    )
    rows = fault_job().training.splitlines(keepends=True)[0]
    async with (
        running_in_process(settings) as (service, _),
        await client_of_many(service, operator="operator") as many,
        await tenant_client(service, "other") as other,
    ):
        await many.submit(endless(), training=fault_job().training)
        alone = await seconds_of_a_job(other, "before")
        began = time.monotonic()
        await submit_all(many, rows)
        submitted = time.monotonic() - began
        with pytest.raises(QuotaExceeded) as caught:
            await many.submit(short(0), training=rows)
        assert (caught.value.reason, caught.value.limit) == ("QUOTA_JOBS", str(JOBS))
        beside = [await seconds_of_a_job(other, f"beside-{number}") for number in range(3)]
        listing = asyncio.create_task(many.jobs())
        during_list = await seconds_of_a_job(other, "during-a-list")
        began = time.monotonic()
        names = {job.name for job in await many.jobs()}
        listed = time.monotonic() - began
        print(f"\n{JOBS} jobs submitted in {submitted:.0f} s, listed in {listed:.1f} s")
        print(f"another tenant's job: {alone:.2f} s, beside them {beside}, during a list {during_list:.2f} s")
        assert len(names) == len(await listing) == JOBS
        assert (await other.jobs(limit=1))[0].name == "during-a-list"
        assert max(*beside, during_list) <= SLOWER * alone + 1.0
    async with (
        running_in_process(settings) as (service, _),
        await client_of_many(service, operator="next-operator") as many,
        await tenant_client(service, "third") as third,
    ):
        await in_line(many, short(JOBS - 1).name, behind=JOBS - FEW)
        await seconds_of_a_job(third, "after-a-restart")
