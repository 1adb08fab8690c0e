"""Slices of `make soak`: several tenants, random jobs, kills, and everything that must hold all the while."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.config import SchedulerSettings
from cola_runtime.testing.chaos import Way
from cola_runtime.testing.soak import Kill, Soak, SoakPlan
from cola_runtime.testing.soak_jobs import TOKEN_BUDGET
from tests.faults.processes import Fleet, Zygote, fleet


@dataclass(slots=True)
class ForkedFleet:
    """As `SoakFleet`, without Ray: the base model is in the coordinator's process, and both are forked."""

    at: Fleet
    problems: list[str] = field(default_factory=list)
    _starting: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def first_key(self) -> str:
        return (self.data_dir / "key").read_text()

    @property
    def data_dir(self) -> Path:
        return self.at.settings.data_dir

    @property
    def device_names(self) -> list[str]:
        return list(self.at.devices)

    def client(self, key: str) -> AsyncClient:
        return AsyncClient(base_url=f"grpc://{self.at.settings.listen}", api_key=key)

    def pids(self) -> dict[str, int]:
        return {"coordinator": self.at.coordinator, **self.at.devices}

    def kill(self, role: str) -> bool:
        os.kill(self.pids()[role], signal.SIGKILL)
        if role == "coordinator":
            self._starting.add(asyncio.create_task(self.at.start_coordinator()))
        else:
            self.at.start_device(role)
        return True

    async def hang(self, role: str) -> bool:
        raise NotImplementedError

    async def cut(self, link: str, way: Way) -> bool:
        raise NotImplementedError


@asynccontextmanager
async def forked(zygote: Zygote, folder: Path, model: Path, devices: int) -> AsyncIterator[ForkedFleet]:
    await asyncio.to_thread(folder.mkdir)
    async with fleet(zygote, folder, model, devices=devices) as at:
        scheduler = SchedulerSettings(token_budget=TOKEN_BUDGET)
        at.settings = at.settings.model_copy(update={"scheduler": scheduler})
        for index in range(devices):
            at.start_device(f"device-{index}")
        await at.start_coordinator()
        yield ForkedFleet(at)


def assert_kept(report: dict[str, Any], *, kills: int) -> None:
    assert report["violations"] == []
    jobs = report["jobs"]
    assert jobs["completed"] > 0
    assert jobs["bit_identical"] >= jobs["fixed"]
    assert sum(kind["struck"] for kind in report["kills"].values()) == kills
    assert not any("was not running" in each["of"] for each in report["rounds"])


@pytest.mark.quick
async def test_jobs_of_several_tenants_outlive_a_device_and_the_coordinator(
    zygote: Zygote, tmp_path: Path
) -> None:
    kills = (Kill.DEVICE, Kill.COORDINATOR)
    of_jobs = {"tenants": 2, "active_each": 2, "kinds": 2, "steps": 20}
    plan = SoakPlan(seed=3, seconds=0, kills=kills, devices=2, round_seconds=0, **of_jobs)
    assert_kept(await Soak(plan, tmp_path, fleet_of=partial(forked, zygote)).run(), kills=len(kills))


@pytest.mark.ray
@pytest.mark.timeout(400)
async def test_a_real_service_outlives_a_device_its_base_model_and_itself(tmp_path: Path) -> None:
    kills = (Kill.DEVICE, Kill.BASE_MODEL, Kill.CUT, Kill.COORDINATOR)
    plan = SoakPlan(seed=4, seconds=0, kills=kills, tenants=2, devices=2, steps=60, round_seconds=5)
    assert_kept(await Soak(plan, tmp_path).run(), kills=len(kills))
