"""A trace of a whole service: what is in it, and that an export does not hold the base model up."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_steps import when_recorded

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.errors import Conflict, PermissionDenied
from cola_runtime.jobs.records import StepRecord
from cola_runtime.server import exports
from cola_runtime.testing.exactness import four_tenants, service_for, tenant_client
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model
from cola_runtime.trace.report import read_trace

STEPS = 12
WAIT_SECONDS = 60.0


def names(trace: dict[str, Any]) -> dict[str, set[str]]:
    """Role of a process -> the names of its spans."""
    found: dict[str, set[str]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            found.setdefault(event["cat"], set()).add(event["name"])
    return found


async def test_a_trace_shows_every_process_and_base_steps_that_go_on_during_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    model = save_tiny_model("gpt2", tmp_path / "model")
    settings = service_for(tmp_path / "service", model=model, name="tiny", dtype="float32")
    went_on, read = threading.Event(), exports.read_checkpoint

    def read_slowly(*arguments: Any) -> bytes:
        """Not before six further steps are recorded: an export that held them up would never end."""
        assert went_on.wait(WAIT_SECONDS), "the base model waited for the export"
        return read(*arguments)

    monkeypatch.setattr(exports, "read_checkpoint", read_slowly)
    job = four_tenants("tiny", steps=STEPS, encoding="auto")[0]
    async with running_in_process(settings) as (service, _), await tenant_client(service, "alice") as client:
        await client.start_trace()
        with pytest.raises(Conflict) as recording:
            await client.start_trace()
        assert recording.value.reason == "TRACE_RECORDING"
        exporting: list[asyncio.Task[Path]] = []

        async def export(_: StepRecord) -> None:
            exporting.append(asyncio.create_task(handle.download_adapter(tmp_path / "adapter", version=0)))

        async def go_on(_: StepRecord) -> None:
            went_on.set()

        when_recorded(service.store, 9, go_on, monkeypatch)
        when_recorded(service.store, 3, export, monkeypatch)
        handle = await client.submit(job.spec, training=job.training, evaluation=job.training)
        await handle.wait(WAIT_SECONDS)
        await exporting[0]
        trace = json.loads(await client.stop_trace())
        busy_seconds = (await client.describe()).base_busy_seconds
    found = names(trace)
    assert {"base step", "install", "taps"} <= found["base model"]
    assert {"optimizer step", "gradients", "checkpoint", "update"} <= found["device"]
    assert {"queued", "export", "checkpoint", "evaluation", "its device"} <= found["coordinator"]
    report = read_trace(trace)
    assert report.exports.exports == 1
    assert report.exports.base_steps_meanwhile >= 4
    assert report.base_busy * report.seconds == pytest.approx(busy_seconds, rel=1e-3)


async def test_only_operators_may_record(tmp_path: Path) -> None:
    model = save_tiny_model("gpt2", tmp_path / "model")
    settings = service_for(tmp_path / "service", model=model, name="tiny", dtype="float32")
    async with (
        running_in_process(settings) as (service, _),
        await tenant_client(service, "alice") as operator,
    ):
        key = (await operator.create_key("bob")).key
        async with AsyncClient(base_url=f"grpc://{service.endpoint}", api_key=key) as bob:
            with pytest.raises(PermissionDenied):
                await bob.start_trace()
            with pytest.raises(PermissionDenied):
                await bob.stop_trace()
        with pytest.raises(Conflict) as nothing:
            await operator.stop_trace()
        assert nothing.value.reason == "TRACE_NOT_RECORDING"
