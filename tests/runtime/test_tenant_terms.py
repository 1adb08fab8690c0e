"""A tenant's weight and caps through the whole service, and what its users are told."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest
import torch

from cola_runtime.cli.job_views import print_jobs
from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.values import Job
from cola_runtime.errors import QuotaExceeded
from cola_runtime.runtime.coordinator import RunningService
from cola_runtime.spec import JobSpec
from cola_runtime.testing.exactness import service_for, tenant_client
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model

WAIT_SECONDS = 60.0
ROWS = b"".join(
    json.dumps({"prompt": "ab" * n, "completion": "cde"[: 1 + n % 3]}).encode() + b"\n" for n in range(1, 9)
)


def job(name: str, *, steps: int = 3, priority: str = "normal") -> JobSpec:
    fields = {"name": name, "base_model": "tiny", "steps": steps, "rows_per_step": 4, "priority": priority}
    return JobSpec.model_validate(fields)


async def admin(service: RunningService) -> AsyncClient:
    return await tenant_client(service, "operator")


async def reason(client: AsyncClient, name: str, *, containing: str) -> Job:
    """The job as soon as its waiting reason says so."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        found = await (await client.job(name)).refresh()
        if containing in found.waiting_reason:
            return found
        assert time.monotonic() < deadline, found.waiting_reason
        await asyncio.sleep(0.02)


async def test_caps_hold_and_every_waiting_job_says_which_one_it_waits_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    model = save_tiny_model("llama", tmp_path / "model", dtype="float32")
    settings = service_for(tmp_path, model=model, name="tiny", dtype="float32", token_budget=64)
    async with running_in_process(settings) as (service, _), await admin(service) as operator:
        made = await operator.create_key("alice", weight=2.0, concurrent_jobs=1, total_steps=2010)
        assert (made.weight, made.concurrent_jobs, made.total_steps) == (2.0, 1, 2010)
        async with AsyncClient(base_url=f"grpc://{service.endpoint}", api_key=made.key) as alice:
            long = await alice.submit(job("long", steps=2000), training=ROWS)
            await alice.submit(job("second"), training=ROWS)
            await alice.submit(job("urgent", priority="high"), training=ROWS)
            cap = "cap of 1 concurrent jobs is reached: 1 are running, "
            shown = [
                await reason(alice, "second", containing=f"{cap}1 wait before it"),
                await reason(alice, "urgent", containing=f"{cap}0 wait before it"),
            ]
            print_jobs(shown)
            assert "concurrent jobs" in capsys.readouterr().out
            with pytest.raises(QuotaExceeded) as refused:
                await alice.submit(job("fourth", steps=5), training=ROWS)
            assert (refused.value.reason, refused.value.limit) == ("QUOTA_STEPS", "2010")
            again = await operator.create_key("alice", tokens_per_minute=60)
            assert (again.weight, again.concurrent_jobs) == (2.0, 1)
            await reason(alice, "long", containing="its tenant's 60 tokens per minute are spent")
            await operator.create_key("alice", tokens_per_minute=0)
            await long.cancel()
            for name in ("urgent", "second"):
                await (await alice.job(name)).wait(WAIT_SECONDS)
            ended = [await (await alice.job(name)).refresh() for name in ("urgent", "second")]
            assert [each.state for each in ended] == ["succeeded", "succeeded"]
            assert ended[0].finished_at < ended[1].finished_at
