"""One adapter on several devices, through the whole service: bit for bit the adapter of one device."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from cola_runtime.client.job_handle import AsyncJobHandle
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
STEPS = 4
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
    "lora with dropout, x and g": {"adapter": {"rank": 2, "dropout": 0.3}, "encoding": "activations"},
    "merged": {"adapter": {"rank": 2}, "mode": "merged"},
    "adafactor": {"optimizer": {"kind": "adafactor", "learning_rate": 1e-2, "max_grad_norm": 0.2}},
}


def job(name: str, shards: int, **fields: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": f"{name}-{shards}",
            "base_model": "tiny",
            "adapter": SEVERAL_KINDS,
            "steps": STEPS,
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

    def __init__(self, folder: Path, architecture: str, dtype: str) -> None:
        torch.set_num_threads(1)
        self.model = save_tiny_model(architecture, folder / "model", dtype=dtype)
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

    async def train(self, spec: JobSpec) -> AsyncJobHandle:
        handle = await self.client.submit(spec, training=ROWS)
        await handle.wait(WAIT_SECONDS)
        return handle

    async def weights(self, handle: AsyncJobHandle) -> Weights:
        folder = await handle.download_adapter(self._folder / handle.name)
        return exported_weights(folder, self.running.base_model)


def identical(some: Weights, others: Weights) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[key], others[key]) for key in some)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
async def test_two_devices_train_bit_for_bit_what_one_trains(dtype: str, tmp_path: Path) -> None:
    async with Service(tmp_path, "llama", dtype) as service:
        for number, (name, fields) in enumerate(CELLS.items()):
            alone, sharded = [
                await service.train(job(f"cell-{number}", shards, **fields)) for shards in (1, 2)
            ]
            assert identical(await service.weights(alone), await service.weights(sharded)), name
            steps, of_shards = await alone.metrics(), await sharded.metrics()
            assert [s.gradient_norm for s in of_shards] == [s.gradient_norm for s in steps], name
            assert all(step.gradient_norm > 0.2 for step in steps), "or nothing was clipped"
            assert {step.device_id for step in of_shards} <= {"device-0, device-1", "device-1, device-0"}
