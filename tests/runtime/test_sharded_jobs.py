"""One adapter on several devices, through the whole service: bit for bit the adapter of one device."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.client.values import Event
from cola_runtime.errors import InvalidInput
from cola_runtime.runtime.coordinator import RunningService
from cola_runtime.spec import JobSpec
from cola_runtime.testing.exactness import (
    MixedJob,
    Weights,
    exported_weights,
    largest_difference,
    service_for,
    tenant_client,
    train_modules,
)
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model

WAIT_SECONDS = 60.0
ROWS = b"".join(
    json.dumps({"prompt": "ab" * n, "completion": "cde"[: 1 + n % 3]}).encode() + b"\n" for n in range(1, 9)
)
SEVERAL_KINDS = [
    {"kind": "linear", "bias": True, "target_modules": "attention"},
    {"kind": "lora", "rank": 3, "alpha": 6, "target_modules": "mlp"},
]
CELLS: dict[str, dict[str, Any]] = {
    "linear and lora, clipped": {"adapter": SEVERAL_KINDS},
    "linear, low rank taps": {"adapter": {"kind": "linear"}, "compression": "low_rank"},
    "lora with dropout, x and g, one step ahead": {
        "adapter": {"rank": 2, "dropout": 0.3},
        "encoding": "activations",
        "max_staleness": 1,
        "checkpoint_every": 100,
    },
    "merged": {"adapter": {"rank": 2}, "mode": "merged"},
}


def job(name: str, shards: int, **fields: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": f"{name}-{shards}",
            "base_model": "tiny",
            "adapter": SEVERAL_KINDS,
            "steps": 3,
            "rows_per_step": 4,
            "adaptation_interval": 2,
            "optimizer": {"learning_rate": 2e-3, "max_grad_norm": 0.2, "weight_decay": 0.01},
            "schedule": {"kind": "linear", "warmup_steps": 1},
            "checkpoint_every": 2,
            "shards": shards,
            **fields,
        }
    )


class Service:
    """A service with two devices and a tenant in one event loop."""

    def __init__(self, folder: Path, dtype: str) -> None:
        torch.set_num_threads(1)
        self.model = save_tiny_model("llama", folder / "model", dtype=dtype)
        self.settings = service_for(folder / "service", model=self.model, name="tiny", dtype=dtype)
        self._folder = folder
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Service:
        self.running: RunningService
        self.running, self.devices = await self._stack.enter_async_context(running_in_process(self.settings))
        self.client = await self._stack.enter_async_context(await tenant_client(self.running, "alice"))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def submit(self, spec: JobSpec) -> AsyncJobHandle:
        return await self.client.submit(spec, training=ROWS)

    async def train(self, spec: JobSpec) -> AsyncJobHandle:
        handle = await self.submit(spec)
        await handle.wait(WAIT_SECONDS)
        return handle

    async def weights(self, handle: AsyncJobHandle) -> Weights:
        folder = await handle.download_adapter(self._folder / handle.name)
        return exported_weights(folder, self.running.base_model)

    def alone(self, spec: JobSpec) -> Weights:
        """The same job by ordinary modules and torch.optim."""
        reference = MixedJob(spec=spec, training=ROWS)
        return train_modules(reference, self.running.base_model, self.model, attention="sdpa")


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with Service(tmp_path, "float64") as service:
        yield service


def identical(some: Weights, others: Weights) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[key], others[key]) for key in some)


async def nth_event(handle: AsyncJobHandle, kind: str, count: int = 1) -> Event:
    async with asyncio.timeout(WAIT_SECONDS):
        async for event in handle.events():
            count -= event.kind == kind
            if count == 0:
                return event
    raise AssertionError(f"the job ended before its {kind}")


async def test_two_devices_train_bit_for_bit_what_one_trains(tmp_path: Path) -> None:
    async with Service(tmp_path, "float32") as service:
        for number, (name, fields) in enumerate(CELLS.items()):
            alone, sharded = [
                await service.train(job(f"cell-{number}", shards, **fields)) for shards in (1, 2)
            ]
            assert identical(await service.weights(alone), await service.weights(sharded)), name
            steps, of_shards = await alone.metrics(), await sharded.metrics()
            assert [s.gradient_norm for s in of_shards] == [s.gradient_norm for s in steps], name
            assert all(step.gradient_norm > 0.2 for step in steps), "or nothing was clipped"
            assert all(step.device_seconds > 0 for step in of_shards)
            for one, both in zip(steps, of_shards, strict=True):
                assert 0 < both.bytes_up - one.bytes_up < 2000, "two ends and norms instead of an end"
                assert 0 < both.bytes_down - one.bytes_down < 2000, "two ends and norms instead of an end"
            assert {step.device_id for step in of_shards} <= {"device-0, device-1", "device-1, device-0"}


async def test_a_lost_device_costs_a_sharded_job_the_steps_since_its_checkpoint(service: Service) -> None:
    """The lease ends for both devices; a third takes the lost one's shard from the checkpoint."""
    service.devices.start("device-2", service.running.endpoint)
    spec = job("lost", 2, steps=8, checkpoint_every=3)
    handle = await service.submit(spec)
    granted = await nth_event(handle, "lease.granted")
    await nth_event(handle, "step.applied", 4)
    await service.devices.kill(granted.data["device_ids"][1])
    await handle.wait(WAIT_SECONDS)
    steps = await handle.metrics()
    assert [step.step for step in steps] == list(range(1, 9))
    assert [step.epoch for step in steps] == sorted(step.epoch for step in steps)
    assert steps[-1].epoch > 1 and granted.data["device_ids"][1] not in steps[-1].device_id
    assert largest_difference(await service.weights(handle), service.alone(spec)) <= 1e-12
    assert await handle.generate("ab", max_new_tokens=2) is not None


async def test_a_sharded_job_pauses_goes_on_and_is_cancelled(service: Service) -> None:
    spec = job("paused", 2, steps=6, checkpoint_every=100)
    handle = await service.submit(spec)
    await nth_event(handle, "step.applied", 2)
    await handle.pause()
    await nth_event(handle, "job.paused")
    await handle.resume()
    await handle.wait(WAIT_SECONDS)
    assert (await handle.metrics())[-1].epoch == 2
    assert largest_difference(await service.weights(handle), service.alone(spec)) <= 1e-12
    other = await service.submit(job("cancelled", 2, steps=500))
    await nth_event(other, "step.applied")
    await other.cancel()
    assert (await other.wait(WAIT_SECONDS, check=False)).state == "cancelled"


async def test_a_job_waits_for_as_many_devices_as_shards_and_holds_up_nobody(service: Service) -> None:
    wide = await service.submit(job("wide", 3))
    await service.train(job("narrow", 1))
    waiting = await wide.refresh()
    assert (waiting.device_id, waiting.version) == ("", 0)
    assert waiting.waiting_reason == "waiting for 3 devices at once, one for each shard"
    service.devices.start("device-2", service.running.endpoint)
    await wide.wait(WAIT_SECONDS)
    granted = await nth_event(wide, "lease.granted")
    assert sorted(granted.data["device_ids"]) == ["device-0", "device-1", "device-2"]


async def test_what_cannot_be_sharded_is_refused_before_anything_exists(service: Service) -> None:
    few = {"adapter": {"rank": 2, "target_modules": ["layers.0.mlp.down_proj"]}}
    for fields, reason in ((few, "SHARDS_TOO_MANY"), ({"inner_steps": 2}, "SHARDS_UNSUPPORTED")):
        with pytest.raises(InvalidInput) as caught:
            await service.submit(job("refused", 2, **fields))
        assert caught.value.reason == reason
    with pytest.raises(ValueError, match="less than or equal to 8"):
        job("refused", 9)
    assert await service.client.jobs() == []
