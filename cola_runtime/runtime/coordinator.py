"""Composition root: everything that `cola serve` runs, wired once, started and stopped in order.

Start: store, Ray and base model, device pool and API on one port, devices, the jobs left from last time.
Stop: drivers and loops first (nothing more is asked of a device), then devices, API, store, Ray.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cola_runtime import crash_points
from cola_runtime.adapters.module_registry import import_adapter_modules
from cola_runtime.config import ServiceSettings, crash_setting
from cola_runtime.gradients.planner import Costs
from cola_runtime.jobs.plan import wire_costs
from cola_runtime.jobs.store import JobStore
from cola_runtime.runtime.certified import Identify, base_model_identity, check_listeners, open_doors
from cola_runtime.runtime.cluster import Cluster
from cola_runtime.scheduler.device_gate import DeviceGate
from cola_runtime.scheduler.device_pool import DevicePool
from cola_runtime.scheduler.leases import LeaseBook
from cola_runtime.scheduler.loop import SchedulerLoop
from cola_runtime.scheduler.ports import BaseModelPort
from cola_runtime.scheduler.retention import collect_orphans
from cola_runtime.scheduler.runner import JobRunner, lost_base_reporter
from cola_runtime.server.service import FineTuningService
from cola_runtime.storage.objects import ObjectStorage
from cola_runtime.trace.spans import SpanRecorder
from cola_runtime.transport.certificates import write_private
from cola_runtime.types import BaseModelDescription

logger = logging.getLogger(__name__)

FIRST_TENANT = "default"
DRAIN_SECONDS = 20.0  # below the 30 s that Kubernetes gives a process by default
DEVICES_START_SECONDS = 30.0  # a device that is gone for good must not hold up a restart


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningService:
    """What the caller of a started service needs."""

    endpoint: str  # host:port of SDK, CLI and devices
    tls: bool
    device_endpoint: str  # host:port of devices; without TLS the same
    join_token: str  # of devices on this machine, where there is no TLS
    first_key: str | None  # of the first tenant, only when it was just created
    base_model: BaseModelDescription
    store: JobStore
    drain: Callable[[], Awaitable[None]]
    """Stop every job at its next step boundary, with a checkpoint, so that none is computed again."""


def serve(settings: ServiceSettings, *, on_ready: Callable[[RunningService], None]) -> None:
    """Run the service until SIGINT or SIGTERM, then let its jobs reach a checkpoint."""
    crash_points.arm(crash_setting())
    asyncio.run(_serve(settings, on_ready))


async def _serve(settings: ServiceSettings, on_ready: Callable[[RunningService], None]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with running_service(settings) as service:
        on_ready(service)
        await stop.wait()
        await service.drain()


@asynccontextmanager
async def running_service(settings: ServiceSettings) -> AsyncIterator[RunningService]:
    """The whole service on Ray, for as long as the context lasts."""
    import_adapter_modules(settings.adapter_modules)  # what is wrong with them is said before Ray starts
    check_listeners(settings)  # likewise
    with Cluster(settings) as cluster:
        join_token = _join_token(settings.data_dir)
        base = await cluster.start_base_model(join_token, identity=base_model_identity(settings))

        def devices_at(endpoint: str, identify: Identify) -> AbstractAsyncContextManager[None]:
            return cluster.running_devices(endpoint, join_token=join_token, identify=identify)

        async with running_coordinator(settings, base, join_token, devices_at=devices_at) as service:
            yield service


@asynccontextmanager
async def running_coordinator(
    settings: ServiceSettings,
    base: BaseModelPort,
    join_token: str,
    *,
    devices_at: Callable[[str, Identify], AbstractAsyncContextManager[None]],
) -> AsyncIterator[RunningService]:
    """Everything of the coordinator process except Ray: also the composition that fast tests use.

    `devices_at(endpoint, identify)` runs the devices that dial it, for as long as it lasts. Jobs start when
    they are there (or late: then without them), so that the first job does not find one device and fill it.
    """
    check_listeners(settings)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    storage = ObjectStorage(f"file://{(settings.data_dir / 'objects').resolve()}")
    store = await JobStore.open(f"sqlite:///{(settings.data_dir / 'jobs.sqlite').resolve()}")
    try:
        await collect_orphans(store, storage)  # before anybody can store what is not recorded yet
        description = await base.describe()
        costs = wire_costs(settings.planner, description, token_budget=settings.scheduler.token_budget)
        runner, pool = _wire(settings, base, description, store, storage, join_token, costs)
        service = FineTuningService(
            store=store,
            storage=storage,
            runner=runner,
            base_models={description.name: description},
            costs=costs,
        )
        doors = await open_doors(settings, service, pool)
        try:
            async with devices_at(doors.device_endpoint, doors.identify):
                await pool.wait_joined(settings.devices.count, timeout_seconds=DEVICES_START_SECONDS)
                await runner.open()
                try:
                    yield RunningService(
                        endpoint=doors.endpoint,
                        tls=doors.tls,
                        device_endpoint=doors.device_endpoint,
                        join_token=join_token,
                        first_key=await _first_key(store),
                        base_model=description,
                        store=store,
                        drain=partial(runner.drain, timeout_seconds=DRAIN_SECONDS),
                    )
                finally:
                    await runner.close()
        finally:
            await doors.close()
    finally:
        await store.close()


def _wire(
    settings: ServiceSettings,
    base: BaseModelPort,
    description: BaseModelDescription,
    store: JobStore,
    storage: ObjectStorage,
    join_token: str,
    costs: Costs,
) -> tuple[JobRunner, DevicePool]:
    book, spans = LeaseBook(), SpanRecorder()
    loop = SchedulerLoop(
        base,
        settings.scheduler,
        on_base_lost=lost_base_reporter(book),
        flat=description.flat,
        spans=spans,
    )
    pool = DevicePool(
        settings.devices,
        gate=DeviceGate(store.devices, join_token=join_token),
        audit=store.audit,
        gradient_endpoint=description.gradient_endpoint,
        book=book,
    )
    runner = JobRunner(
        base=base,
        description=description,
        loop=loop,
        pool=pool,
        book=book,
        store=store,
        storage=storage,
        costs=costs,
        spans=spans,
        retention=settings.retention,
        spot_checks=settings.spot_checks,
    )
    return runner, pool


def _join_token(data_dir: Path) -> str:
    """The secret that devices join with; made at first start, readable by its owner only."""
    path = data_dir / "join-token"
    if not path.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        write_private(path, secrets.token_urlsafe(32).encode())
    return path.read_text(encoding="ascii").strip()


async def _first_key(store: JobStore) -> str | None:
    """A key for a first tenant, when there is no tenant yet."""
    if await store.tenants():
        return None
    await store.create_tenant(FIRST_TENANT)
    return await store.create_key(FIRST_TENANT)
