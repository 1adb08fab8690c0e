"""Every fault of a stream, both ways, between a device and the base model and the coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest

from cola_runtime.base_model.service import BaseModelService
from cola_runtime.config import DeviceSettings, ServiceSettings
from cola_runtime.runtime.certified import Identify
from cola_runtime.runtime.coordinator import RunningService, running_coordinator
from cola_runtime.scheduler.ports import BaseModelPort
from cola_runtime.testing.chaos import LASTING, Chaos, FaultKind, StreamFault, Way
from cola_runtime.testing.chaos_proxy import byte_proxy, frame_proxy
from cola_runtime.testing.exactness import service_for, tenant_client
from cola_runtime.testing.in_process import JOIN_TOKEN, InProcessDevices, running_replica
from cola_runtime.types import BaseModelDescription
from tests.faults.judging import MODEL, WAIT_SECONDS, Accept, Faultless, fault_job, judge

PROXIES = {"bytes": byte_proxy, "frames": frame_proxy}
HEALS_AFTER_SECONDS = {"coordinator": 5.0, "base model": 18.0}  # later than a stalled peer is given up
AT = {  # a unit in the middle of the job, on each link and way
    ("base model", "frames"): 12,
    ("base model", "bytes"): 12,
    ("coordinator", "frames"): 3,
    ("coordinator", "bytes"): 8,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamCase:
    link: str  # to whom the device's stream goes
    proxy: str
    kind: FaultKind
    way: Way

    @property
    def name(self) -> str:
        return f"{self.kind} of {self.proxy}, device and {self.link}, {self.way}"

    @property
    def quick(self) -> bool:
        """One of each link in a plain run."""
        return self.proxy == "frames" and (self.link, self.kind, self.way) in {
            ("base model", FaultKind.CUT, Way.TO_CLIENT),
            ("base model", FaultKind.DUPLICATE, Way.TO_SERVER),
            ("coordinator", FaultKind.CORRUPT, Way.TO_SERVER),
        }


def cases() -> list[StreamCase]:
    """A frame cannot be stalled for long by who speaks gRPC: its pings are answered by the proxy itself."""
    return [
        StreamCase(link=link, proxy=proxy, kind=kind, way=way)
        for link in ("base model", "coordinator")
        for proxy in PROXIES
        for kind in FaultKind
        for way in Way
        if not (proxy == "frames" and kind is FaultKind.STALL)
        and not (proxy == "bytes" and kind is FaultKind.DROP)  # TCP itself sends again what is lost
    ]


class _Moved:
    """A base model that devices reach at another endpoint."""

    def __init__(self, base: BaseModelService, endpoint: str) -> None:
        self._base, self._endpoint = base, endpoint

    async def describe(self) -> BaseModelDescription:
        return replace(await self._base.describe(), gradient_endpoint=self._endpoint)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


@asynccontextmanager
async def harmed_service(
    settings: ServiceSettings, case: StreamCase, chaos: Chaos
) -> AsyncIterator[RunningService]:
    """A service in this process with one device, whose stream of the case goes through its proxy."""
    devices, proxy = InProcessDevices(settings.devices.count), PROXIES[case.proxy]
    async with AsyncExitStack() as stack:
        base = await stack.enter_async_context(running_replica(settings, settings.base_models[0]))
        port = cast(BaseModelPort, base)
        if case.link == "base model":
            endpoint = (await base.describe()).gradient_endpoint
            harmed = await stack.enter_async_context(proxy(endpoint, chaos))
            port = cast(BaseModelPort, _Moved(base, harmed))

        @asynccontextmanager
        async def devices_at(endpoint: str, identify: Identify) -> AsyncIterator[None]:
            async with AsyncExitStack() as inner:
                if case.link == "coordinator":
                    endpoint = await inner.enter_async_context(proxy(endpoint, chaos))
                await inner.enter_async_context(devices.running(endpoint, identify))
                yield

        yield await stack.enter_async_context(
            running_coordinator(settings, [port], JOIN_TOKEN, devices_at=devices_at)
        )


async def heal(case: StreamCase, chaos: Chaos) -> float:
    """Wait for the fault, and end it in time if it would last; returns its moment."""
    await chaos.struck.wait()
    moment = time.time()
    if case.kind in LASTING:
        await asyncio.sleep(HEALS_AFTER_SECONDS[case.link] if case.kind is FaultKind.STALL else 2.0)
        chaos.clear()
    return moment


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[pytest.mark.quick] if case.quick else []) for case in cases()],
)
async def test_a_faulty_stream_costs_no_step(
    case: StreamCase, model: Path, tmp_path: Path, faultless: Faultless, accept: Accept
) -> None:
    chaos = Chaos(
        StreamFault(kind=case.kind, way=case.way, at=AT[case.link, case.proxy], bytes_per_second=50_000)
    )
    settings = service_for(tmp_path, model=model, name=MODEL, dtype="float32").model_copy(
        update={"devices": DeviceSettings(count=1, heartbeat_seconds=0.5, lease_timeout_seconds=3.0)}
    )
    async with (
        harmed_service(settings, case, chaos) as service,
        await tenant_client(service, "alice") as client,
    ):
        healing = asyncio.create_task(heal(case, chaos))
        handle = await client.submit(fault_job().spec, training=fault_job().training)
        await handle.wait(WAIT_SECONDS)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(healing), 30)
        faults = [healing.result()] if healing.done() else []
        healing.cancel()
        outcome = await judge(
            handle, faultless, part="stream", case=case.name, faults=faults, data_dir=tmp_path
        )
    accept(outcome)
