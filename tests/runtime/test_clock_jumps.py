"""The machine's clock jumps by an hour, both ways, while jobs run: nobody loses a lease by it."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from cola_runtime import clock
from cola_runtime.config import DeviceSettings
from cola_runtime.spec import JobSpec
from cola_runtime.testing.exactness import service_for, tenant_client
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model

WAIT_SECONDS = 60.0
HOUR = 3600.0
ROWS = b"".join(json.dumps({"prompt": "ab" * n, "completion": "cde"}).encode() + b"\n" for n in range(1, 9))
SPEC = JobSpec(name="chat", base_model="tiny", steps=12, rows_per_step=4, checkpoint_every=4)


async def test_a_clock_that_jumps_costs_no_lease_and_lets_devices_in_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    model = save_tiny_model("llama", tmp_path / "model", dtype="float32")
    settings = service_for(tmp_path, model=model, name="tiny", dtype="float32").model_copy(
        update={"devices": DeviceSettings(count=1, heartbeat_seconds=0.1, lease_timeout_seconds=2.0)}
    )
    real, jump = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + jump[0])
    async with (
        running_in_process(settings) as (service, devices),
        await tenant_client(service, "alice") as client,
    ):
        for part in (service.store, service.store.devices, service.store.audit):
            monkeypatch.setattr(part, "_now", lambda: clock.now() + timedelta(seconds=jump[0]))
        handle = await client.submit(SPEC, training=ROWS)
        async for event in handle.events():
            if event.kind == "step.applied":
                jump[0] = {3: HOUR, 6: -HOUR, 9: 2 * HOUR}.get(event.data["step"], jump[0])
        events = [event async for event in handle.events(follow=False)]
        assert (await handle.refresh()).state == "succeeded"
        assert not [event for event in events if event.kind == "lease.lost"]
        assert {step.epoch for step in await handle.metrics()} == {1}
        await devices.start_certified("late", service.device_endpoint)  # behind the jumps
        deadline = time.monotonic() + WAIT_SECONDS
        while "late" not in {each.device_id for each in (await client.describe()).devices}:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
