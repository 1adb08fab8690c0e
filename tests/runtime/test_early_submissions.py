"""The door is open before the service has taken up the jobs that it had."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.jobs.records import JobRecord
from cola_runtime.jobs.store import JobStore
from cola_runtime.runtime import coordinator
from cola_runtime.runtime.certified import open_doors
from cola_runtime.scheduler.runner import JobRunner
from cola_runtime.testing.exactness import service_for
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model
from tests.faults.judging import MODEL, WAIT_SECONDS, fault_job


async def reaches(store: JobStore, job_id: str, *states: str) -> JobRecord:
    deadline = time.monotonic() + WAIT_SECONDS
    while (record := await store.job(job_id)).state not in states:
        assert time.monotonic() < deadline, record
        await asyncio.sleep(0.02)
    return record


async def test_a_job_that_comes_in_meanwhile_is_not_taken_for_one_of_the_last_coordinator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoints: list[str] = []
    jobs: list[str] = []
    open_runner = JobRunner.open

    async def told_doors(*arguments: object) -> object:
        doors = await open_doors(*arguments)  # type: ignore[arg-type]
        endpoints.append(doors.endpoint)
        return doors

    async def open_late(runner: JobRunner) -> None:
        """Once an early job has its first lease."""
        store = runner._store
        await store.create_tenant("early")
        key, job = await store.create_key("early"), fault_job(steps=3)
        async with AsyncClient(base_url=f"grpc://{endpoints[0]}", api_key=key) as client:
            jobs.append((await client.submit(job.spec, training=job.training)).job_id)
        await reaches(store, jobs[0], "running")
        await open_runner(runner)

    monkeypatch.setattr(coordinator, "open_doors", told_doors)
    monkeypatch.setattr(JobRunner, "open", open_late)
    model = save_tiny_model("gpt2", tmp_path / "model")
    settings = service_for(tmp_path / "service", model=model, name=MODEL, dtype="float32")
    async with running_in_process(settings) as (service, _):
        record = await reaches(service.store, jobs[0], "succeeded", "failed")
    assert (record.state, record.epoch, record.failure_message) == ("succeeded", 1, None)
