"""A missed deadline through the whole service: an event, visible, and the end of the job where it says so."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from cola_runtime.cli.job_views import print_job
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.client.values import Event
from cola_runtime.errors import InvalidInput
from cola_runtime.scheduler.policy import FairQueue
from cola_runtime.scheduler.waiting import Waiting
from cola_runtime.spec import JobSpec
from cola_runtime.spec_parsing import parse_job_spec
from cola_runtime.testing.exactness import four_tenants, service_for, tenant_client
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model

WAIT_SECONDS = 60.0


def job(name: str, **deadline: object) -> JobSpec:
    template = four_tenants("tiny", steps=3, encoding="auto")[0].spec
    return JobSpec.model_validate({**template.model_dump(), "name": name, "deadline": deadline})


async def event(handle: AsyncJobHandle, kind: str) -> Event:
    async with asyncio.timeout(WAIT_SECONDS):
        async for each in handle.events():
            if each.kind == kind:
                return each
    raise AssertionError(f"no {kind}")


async def test_a_missed_deadline_is_an_event_and_ends_the_job_only_if_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    model = save_tiny_model("gpt2", tmp_path / "model")
    settings = service_for(tmp_path / "service", model=model, name="tiny", dtype="float32")
    settings = settings.model_copy(update={"devices": settings.devices.model_copy(update={"count": 0})})
    training = four_tenants("tiny", steps=3, encoding="auto")[0].training
    queued: list[tuple[Waiting, float]] = []
    add = FairQueue.add

    def add_and_note(queue: FairQueue, waiting: Waiting, *, now: float) -> None:
        queued.append((waiting, now))
        add(queue, waiting, now=now)

    monkeypatch.setattr(FairQueue, "add", add_and_note)
    async with (
        running_in_process(settings) as (service, devices),
        await tenant_client(service, "a") as client,
    ):
        late = await client.submit(job("late", seconds=0.2), training=training)
        ended = await client.submit(job("ended", seconds=0.2, when_missed="cancel"), training=training)
        paused = await client.submit(job("paused", seconds=0.2), training=training)
        in_time = await client.submit(job("in-time", seconds=3600), training=training)
        await paused.pause()
        for handle in (late, ended, paused):
            missed = await event(handle, "job.deadline_missed")
            assert (missed.level, missed.data["version"], missed.data["total_steps"]) == ("warning", 0, 3)
        cancelled = await ended.wait(WAIT_SECONDS, check=False)
        assert cancelled.state == "cancelled"
        assert "its deadline has passed" in (await event(ended, "job.cancelled")).message
        devices.start("device-0", service.endpoint)
        done = await late.wait(WAIT_SECONDS)
        assert (done.state, done.deadline_missed_at > done.deadline_at) == ("succeeded", True)
        met = await in_time.wait(WAIT_SECONDS)
        assert (met.deadline_missed_at, met.deadline_at > met.finished_at) == ("", True)
        print_job(done)
        assert f"{done.deadline_at}, missed" in capsys.readouterr().out
        assert (await paused.refresh()).state == "paused"
    in_danger = {(waiting.job_id, waiting.in_danger(now)) for waiting, now in queued}
    assert in_danger == {(late.job_id, True), (in_time.job_id, False)}


@pytest.mark.parametrize(
    "deadline", [{"seconds": 0}, {"seconds": 1e9}, {"seconds": 5, "when_missed": "fail"}, {}, 5]
)
def test_a_deadline_that_is_none_is_refused(deadline: object) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse_job_spec({"name": "a", "base_model": "tiny", "deadline": deadline})
    assert refused.value.violations[0].where.startswith("job.deadline")
