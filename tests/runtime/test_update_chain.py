"""Devices and storages that do not keep to a job's update chain, end to end: refused, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.config import DeviceSettings
from cola_runtime.device.session import AdapterSession
from cola_runtime.errors import Conflict
from cola_runtime.runtime.coordinator import RunningService
from cola_runtime.spec import JobSpec
from cola_runtime.testing.exactness import service_for, tenant_client
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model

WAIT_SECONDS = 60.0
STEPS = 6
ROWS = b"".join(json.dumps({"prompt": "ab" * n, "completion": "cde"}).encode() + b"\n" for n in range(1, 9))
SPEC = JobSpec(name="chat", base_model="tiny", steps=STEPS, rows_per_step=4, checkpoint_every=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), dtype="float32")


async def trained(folder: Path, model: Path) -> tuple[str, list[str], list[Any]]:
    """sha256 of the last checkpoint, the reasons for which leases were lost, the recorded chain."""
    settings = service_for(folder, model=model, name="tiny", dtype="float32")
    settings = settings.model_copy(update={"devices": DeviceSettings(count=1, heartbeat_seconds=0.1)})
    async with (
        running_in_process(settings) as (service, _),
        await tenant_client(service, "alice") as client,
    ):
        handle = await client.submit(SPEC, training=ROWS)
        await handle.wait(WAIT_SECONDS)
        return await _outcome(handle, service)


async def _outcome(handle: AsyncJobHandle, service: RunningService) -> tuple[str, list[str], list[Any]]:
    events = [event async for event in handle.events(follow=False)]
    lost = [str(event.data["reason"]) for event in events if event.kind == "lease.lost"]
    checkpoints = await handle.checkpoints()
    assert checkpoints[-1].version == STEPS
    steps = await service.store.steps(handle.job_id)
    return checkpoints[-1].sha256, lost, [step.chain for step in steps]


class Once:
    """True the first time that it is asked, and false from then on."""

    def __init__(self) -> None:
        self.asked = False

    def __bool__(self) -> bool:
        first, self.asked = not self.asked, True
        return first


@pytest.fixture(scope="module")
def honest(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """sha256 of the last checkpoint where nobody cheats."""
    last, lost, chain = asyncio.run(trained(tmp_path_factory.mktemp("honest"), model))
    assert lost == []
    assert len(set(chain)) == STEPS
    assert all(len(link) == 64 for link in chain)
    return last


async def test_a_device_that_sends_older_weights_is_refused_and_costs_no_step(
    honest: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[int, torch.Tensor] = {}
    once = Once()

    def vector(session: AdapterSession) -> torch.Tensor:
        kept.setdefault(session.version, session._weights_P.clone())
        return kept[1] if session.version == 3 and once else session._weights_P

    monkeypatch.setattr(AdapterSession, "weights_vector", property(vector))
    last, lost, _ = await trained(tmp_path, model)
    assert (last, lost) == (honest, ["UPDATE_ROLLED_BACK"])


async def test_a_checkpoint_of_other_weights_than_were_sent_is_refused(
    honest: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, once = AdapterSession.checkpoint, Once()

    def checkpoint(session: AdapterSession) -> bytes:
        if session.version != 4 or not once:
            return make(session)
        session._weights_P[0] += 1
        made = make(session)
        session._weights_P[0] -= 1
        return made

    monkeypatch.setattr(AdapterSession, "checkpoint", checkpoint)
    last, lost, _ = await trained(tmp_path, model)
    assert (last, lost) == (honest, ["CHECKPOINT_UNCHAINED"])


async def test_a_job_goes_on_from_the_last_checkpoint_that_is_whole(
    honest: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object of version 4 is damaged in storage before the device is lost that made it."""
    settings = service_for(tmp_path, model=model, name="tiny", dtype="float32")
    settings = settings.model_copy(update={"devices": DeviceSettings(count=1, heartbeat_seconds=0.1)})
    apply, once = AdapterSession.apply, Once()

    def damaging(session: AdapterSession, **how: Any) -> Any:
        if session.version == 5 and once:
            (stored,) = tmp_path.rglob("00000004-*.safetensors")
            stored.write_bytes(stored.read_bytes()[:-1] + b"\x01")
            raise Conflict("VERSION_MISMATCH", "as if")
        return apply(session, **how)

    monkeypatch.setattr(AdapterSession, "apply", damaging)
    async with (
        running_in_process(settings) as (service, _),
        await tenant_client(service, "alice") as client,
    ):
        handle = await client.submit(SPEC, training=ROWS)
        await handle.wait(WAIT_SECONDS)
        events = [event async for event in handle.events(follow=False)]
        (refused,) = [event for event in events if event.kind == "checkpoint.refused"]
        assert refused.data == {"version": 4, "reason": "CHECKPOINT_DAMAGED"}
        assert [event.data["to"] for event in events if event.kind == "job.rewound"] == [2]
        assert (await _outcome(handle, service))[0] == honest
