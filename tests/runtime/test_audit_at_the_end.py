"""A coordinator that stops has written down who left."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import torch

from cola_runtime.device.agent import DeviceAgent
from cola_runtime.device.config import DeviceConfig
from cola_runtime.jobs.store import JobStore
from cola_runtime.testing.exactness import service_for
from cola_runtime.testing.in_process import JOIN_TOKEN, running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model

GUESTS = ("guest-1", "guest-2")
SECONDS = 20.0


async def test_devices_that_stay_until_the_service_stops_are_in_the_trail_as_having_left(
    tmp_path: Path,
) -> None:
    torch.set_num_threads(1)
    model = save_tiny_model("llama", tmp_path / "model")
    settings = service_for(tmp_path / "data", model=model, name="tiny", dtype="float32")
    guests: list[asyncio.Task[None]] = []
    async with running_in_process(settings) as (service, _):
        for name in GUESTS:
            config = DeviceConfig(
                device_id=name, coordinator_endpoint=service.device_endpoint, join_token=JOIN_TOKEN
            )
            guests.append(asyncio.create_task(DeviceAgent(config).run()))
        async with asyncio.timeout(SECONDS):
            while len(await service.store.audit.entries()) < len(GUESTS) + 2:  # noqa: ASYNC110 (a table)
                await asyncio.sleep(0.02)
    for guest in guests:
        guest.cancel()
    await asyncio.gather(*guests, return_exceptions=True)
    store = await JobStore.open(settings.store_url)
    found = Counter((each.kind, each.actor) for each in await store.audit.entries())
    await store.close()
    names = (*GUESTS, *(f"device-{number}" for number in range(settings.devices.count)))
    assert found == {(kind, name): 1 for name in names for kind in ("device.joined", "device.left")}
