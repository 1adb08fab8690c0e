"""Every job that is not in a base step says why, through the whole service."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import torch
from recorded_steps import when_recorded

from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.jobs.records import StepRecord
from cola_runtime.spec import JobSpec
from cola_runtime.testing.exactness import four_tenants, service_for, tenant_client
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model

WAIT_SECONDS = 60.0


def job(name: str, **fields: object) -> JobSpec:
    template = four_tenants("tiny", steps=6, encoding="auto")[0].spec
    return JobSpec.model_validate({**template.model_dump(), "name": name, **fields})


async def said(handle: AsyncJobHandle, text: str) -> str:
    """The reason, as soon as `text` is in it."""
    deadline = time.monotonic() + WAIT_SECONDS
    while text not in (await handle.refresh()).waiting_reason:
        assert time.monotonic() < deadline, handle.job
        await asyncio.sleep(0.01)
    return handle.job.waiting_reason


async def test_a_job_says_what_it_waits_for_from_submission_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    model = save_tiny_model("gpt2", tmp_path / "model")
    settings = service_for(tmp_path / "service", model=model, name="tiny", dtype="float32")
    settings = settings.model_copy(update={"devices": settings.devices.model_copy(update={"count": 0})})
    training = four_tenants("tiny", steps=6, encoding="auto")[0].training
    async with (
        running_in_process(settings) as (service, devices),
        await tenant_client(service, "a") as client,
    ):
        first = await client.submit(job("first", steps=200), training=training)
        assert await said(first, "device") == "waiting for a device: no device is connected"
        held, go_on = asyncio.Event(), asyncio.Event()

        async def hold(_: StepRecord) -> None:
            held.set()
            await go_on.wait()

        when_recorded(service.store, 2, hold, monkeypatch)
        devices.start("device-0", service.endpoint)
        await held.wait()
        assert (await first.refresh()).waiting_reason == "step 2 is being recorded"
        await first.pause()
        stopping = "step 2 is being recorded; it is paused at the next step boundary"
        assert (await first.refresh()).waiting_reason == stopping
        go_on.set()
        await said(first, "paused; it goes on when it is resumed")
        sharded = await client.submit(job("sharded", shards=2), training=training)
        await said(sharded, "waiting for 2 devices at once, one for each shard")
        await devices.kill("device-0")
        await first.resume()
        await said(first, "no device is connected")
        await sharded.cancel()
        devices.start("device-1", service.endpoint)
        await first.cancel()
        ended = await first.wait(WAIT_SECONDS, check=False)
        assert (ended.state, ended.waiting_reason) == ("cancelled", "")
