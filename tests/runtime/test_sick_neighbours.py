"""A tenant goes through the whole service beside a neighbour with sick numbers, and no bit of it changes.

The neighbour's rows are put into each of the tenant's base steps, so that the steps are composed alike in
every run; its adapter has the tenant's shape, so that both are computed in the same batched products.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from cola_runtime.base_model.service import BaseModelService
from cola_runtime.config import ServiceSettings
from cola_runtime.runtime.coordinator import RunningService, running_coordinator
from cola_runtime.scheduler.ports import BaseModelPort
from cola_runtime.testing.exactness import MixedJob, four_tenants, recipe_for, service_for, tenant_client
from cola_runtime.testing.in_process import JOIN_TOKEN, InProcessDevices, running_replica
from cola_runtime.testing.tiny_models import save_tiny_model
from cola_runtime.types import BaseStep, BaseStepResult, Lease

STEPS = 6
NEIGHBOUR = Lease(job_id="job-" + "0f" * 16, epoch=1, device_id="nobody")


class WithNeighbour:
    """The base model, every step of which holds the neighbour's rows as well."""

    def __init__(self, base: BaseModelService) -> None:
        self._base = base
        self.losses: list[float] = []

    async def run(self, step: BaseStep) -> BaseStepResult:
        rows = tuple(reversed(step.segments[0].rows))
        neighbour = replace(step.segments[0], lease=NEIGHBOUR, version=0, rows=rows)
        result = await self._base.run(replace(step, segments=(neighbour, *step.segments)))
        assert result.losses[0].reason is None
        self.losses.append(result.losses[0].loss_sum)
        return replace(result, losses=result.losses[1:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


@asynccontextmanager
async def beside(
    neighbour: float, job: MixedJob, settings: ServiceSettings
) -> AsyncIterator[tuple[RunningService, WithNeighbour]]:
    """The service, whose base model holds a neighbour with this number all over its adapter."""
    [chosen] = settings.base_models
    assert chosen.path is not None
    async with running_replica(settings, chosen) as base:
        recipe = recipe_for(job, await base.describe(), chosen.path)
        weights = {key: torch.full_like(w, neighbour) for key, w in recipe.initial_weights.items()}
        base._model.install(NEIGHBOUR, recipe.spec, 0, weights)
        both = WithNeighbour(base)
        devices = InProcessDevices(settings.devices.count)
        async with running_coordinator(
            settings, [cast(BaseModelPort, both)], JOIN_TOKEN, devices_at=devices.running
        ) as service:
            yield service, both


async def last_checkpoint(
    neighbour: float, job: MixedJob, settings: ServiceSettings
) -> tuple[str, list[float]]:
    async with (
        beside(neighbour, job, settings) as (service, both),
        await tenant_client(service, "alice") as client,
    ):
        handle = await client.submit(job.spec, training=job.training)
        await handle.wait(60)
        return (await handle.checkpoints())[-1].sha256, both.losses


async def test_a_neighbour_that_is_not_finite_or_overflows_changes_no_bit(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = save_tiny_model("gpt2", tmp_path / "model")
    job = four_tenants("tiny", steps=STEPS, encoding="auto")[0]

    def settings(name: str) -> ServiceSettings:
        return service_for(tmp_path / name, model=model, name="tiny", dtype="float32")

    healthy, losses = await last_checkpoint(0.01, job, settings("healthy"))
    assert all(map(math.isfinite, losses))
    for number in (math.nan, math.inf, 1e30):
        sick, losses = await last_checkpoint(number, job, settings(f"sick-{number}"))
        assert not any(map(math.isfinite, losses)), "the neighbour is sick"
        assert sick == healthy
