"""Composition root: everything that `cola serve` runs, wired once, started and stopped in order.

Start: store, Ray and base model, device pool and API on one port, devices, the jobs left from last time.
Stop: drivers and loops first (nothing more is asked of a device), then devices, API, store, Ray.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from cola_runtime import crash_points
from cola_runtime.adapters.module_registry import import_adapter_modules
from cola_runtime.config import SchedulerSettings, ServiceSettings, crash_setting
from cola_runtime.errors import ColaError, Conflict
from cola_runtime.jobs.damage import check_whole
from cola_runtime.jobs.hold import taken_over
from cola_runtime.jobs.plan import wire_costs
from cola_runtime.jobs.store import JobStore
from cola_runtime.machine import keep_started_objects
from cola_runtime.runtime.certified import Identify, check_listeners, open_doors
from cola_runtime.runtime.cluster import Cluster
from cola_runtime.runtime.head_watch import head_address, head_lost
from cola_runtime.scheduler.device_gate import DeviceGate
from cola_runtime.scheduler.device_pool import DevicePool
from cola_runtime.scheduler.leases import LeaseBook
from cola_runtime.scheduler.loop import SchedulerLoop
from cola_runtime.scheduler.ports import BaseModelPort
from cola_runtime.scheduler.replicas import Replica, ReplicaSet, lost_replica_reporter, replica_name
from cola_runtime.scheduler.retention import collect_orphans
from cola_runtime.scheduler.runner import JobRunner, ServedBaseModel
from cola_runtime.server.limits import Limits
from cola_runtime.server.service import FineTuningService
from cola_runtime.storage.objects import ObjectStorage
from cola_runtime.trace.spans import SpanRecorder
from cola_runtime.transport.certificates import write_private
from cola_runtime.types import BaseModelDescription

logger = logging.getLogger(__name__)

FIRST_TENANT = "default"
DRAIN_SECONDS = 20.0  # below the 30 s that Kubernetes gives a process by default
DRAIN_WITHOUT_HEAD_SECONDS = 10.0  # what is left of Ray ends by itself a minute after its head
DEVICES_START_SECONDS = 30.0  # a device that is gone for good must not hold up a restart


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningService:
    """What the caller of a started service needs."""

    endpoint: str  # host:port of SDK, CLI and devices
    tls: bool
    device_endpoint: str  # host:port of devices; without TLS the same
    join_token: str  # of devices on this machine, where there is no TLS
    first_key: str | None  # of the first tenant, only when it was just created
    base_models: tuple[BaseModelDescription, ...]
    store: JobStore
    drain: Callable[[], Awaitable[None]]
    """Stop every job at its next step boundary, with a checkpoint, so that none is computed again."""

    @property
    def base_model(self) -> BaseModelDescription:
        """The one that is meant where none is named."""
        return self.base_models[0]


def serve(
    settings: ServiceSettings,
    *,
    on_ready: Callable[[RunningService], None],
    leave: Callable[[ColaError], NoReturn],
) -> None:
    """Run the service until SIGINT or SIGTERM, then let its jobs reach a checkpoint.

    `leave` is called when Ray's head is lost, with the jobs at a checkpoint where they could get to one, and
    ends the process at once: with nobody at the head, giving anything back to Ray would hang.
    """
    crash_points.arm(crash_setting())
    asyncio.run(_serve(settings, on_ready, leave))


async def _serve(
    settings: ServiceSettings,
    on_ready: Callable[[RunningService], None],
    leave: Callable[[ColaError], NoReturn],
) -> None:
    stop = asyncio.Event()
    _stop_on_signals(stop)
    async with running_service(settings) as service:
        _stop_on_signals(stop)  # again: Ray put a handler of its own there, which ends the process at once
        keep_started_objects()
        on_ready(service)
        lost = asyncio.create_task(head_lost(head_address()), name="head-watch")
        stopped = asyncio.create_task(until_stopped(stop, service.store))
        await asyncio.wait((lost, stopped), return_when=asyncio.FIRST_COMPLETED)
        if lost.done():
            error = lost.result()
            logger.error("%s: %s; the service ends", error.reason, error, extra={"event": "ray.lost"})
            with suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_WITHOUT_HEAD_SECONDS):
                    await service.drain()
            leave(error)
        lost.cancel()
        stopped.result()
        await service.drain()


async def until_stopped(stop: asyncio.Event, store: JobStore) -> None:
    """Wait until this coordinator is told to stop.

    Raises Unavailable `STORE_TAKEN_OVER` when it must, since nothing that its jobs do could be recorded.
    """
    ends = asyncio.create_task(stop.wait()), asyncio.create_task(store.taken_over())
    done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()
    if ends[0] not in done:
        raise taken_over()


def _stop_on_signals(stop: asyncio.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)


@asynccontextmanager
async def running_service(settings: ServiceSettings) -> AsyncIterator[RunningService]:
    """The whole service on Ray, for as long as the context lasts."""
    import_adapter_modules(settings.adapter_modules)  # what is wrong with them is said before Ray starts
    check_listeners(settings)  # likewise
    if settings.database is None:
        check_whole(settings.store_file)  # likewise
    if settings.ray_address is None:
        _kept_secret(settings.ray_token)
    with Cluster(settings) as cluster:
        join_token = _kept_secret(settings.data_dir / "join-token")
        bases = await cluster.start_base_models(join_token)

        def devices_at(endpoint: str, identify: Identify) -> AbstractAsyncContextManager[None]:
            return cluster.running_devices(endpoint, join_token=join_token, identify=identify)

        async with running_coordinator(settings, bases, join_token, devices_at=devices_at) as service:
            yield service


@asynccontextmanager
async def running_coordinator(
    settings: ServiceSettings,
    bases: Sequence[BaseModelPort],
    join_token: str,
    *,
    devices_at: Callable[[str, Identify], AbstractAsyncContextManager[None]],
) -> AsyncIterator[RunningService]:
    """Everything of the coordinator process except Ray: also the composition that fast tests use.

    `bases` are the replicas of all base models; which base model one is of, it says itself.

    `devices_at(endpoint, identify)` runs the devices that dial it, for as long as it lasts. Jobs start when
    they are there (or late: then without them), so that the first job does not find one device and fill it.
    """
    check_listeners(settings)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    storage = ObjectStorage(f"file://{(settings.data_dir / 'objects').resolve()}")
    store = await JobStore.open(settings.store_url)
    try:
        await _check_objects(store, settings.data_dir)
        await collect_orphans(store, storage)  # before anybody can store what is not recorded yet
        book, spans = LeaseBook(), SpanRecorder()
        base_models = await _base_models(settings, bases, book, spans)
        runner, pool = _wire(settings, base_models, store, storage, join_token, book, spans)
        service = FineTuningService(
            store=store,
            storage=storage,
            runner=runner,
            base_models={name: each.description for name, each in base_models.items()},
            limits=Limits(active_jobs=settings.active_jobs),
            costs={name: each.costs for name, each in base_models.items()},
        )
        await runner.requeue_running()
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
                        base_models=tuple(each.description for each in base_models.values()),
                        store=store,
                        drain=partial(runner.drain, timeout_seconds=DRAIN_SECONDS),
                    )
                finally:
                    await runner.close()
        finally:
            await doors.close()
            pool.close()
    finally:
        await store.close()


async def _base_models(
    settings: ServiceSettings, bases: Sequence[BaseModelPort], book: LeaseBook, spans: SpanRecorder
) -> dict[str, ServedBaseModel]:
    """The base models by name, in the order of the settings."""
    replicas: dict[str, list[Replica]] = {chosen.name: [] for chosen in settings.base_models}
    for base in bases:
        description = await base.describe()
        of_model = replicas[description.name]
        name = replica_name(description.name, len(of_model))
        loop = SchedulerLoop(
            base,
            _scheduling(settings, description.name),
            on_base_lost=lost_replica_reporter(book, name),
            unpadded=description.unpadded,
            bank_bytes=description.bank_bytes,
            spans=spans,
        )
        of_model.append(Replica(name=name, base=base, loop=loop, description=description))
    return {
        name: ServedBaseModel(
            replicas=ReplicaSet(of_model, book=book, rebalance_seconds=settings.scheduler.rebalance_seconds),
            costs=wire_costs(
                settings.planner,
                of_model[0].description,
                token_budget=_scheduling(settings, name).token_budget,
            ),
        )
        for name, of_model in replicas.items()
    }


def _scheduling(settings: ServiceSettings, base_model: str) -> SchedulerSettings:
    [own] = [chosen.token_budget for chosen in settings.base_models if chosen.name == base_model]
    return settings.scheduler.model_copy(update={"token_budget": own or settings.scheduler.token_budget})


def _wire(
    settings: ServiceSettings,
    base_models: Mapping[str, ServedBaseModel],
    store: JobStore,
    storage: ObjectStorage,
    join_token: str,
    book: LeaseBook,
    spans: SpanRecorder,
) -> tuple[JobRunner, DevicePool]:
    pool = DevicePool(
        settings.devices,
        gate=DeviceGate(store.devices, join_token=join_token),
        audit=store.audit,
        book=book,
    )
    runner = JobRunner(
        base_models=base_models,
        pool=pool,
        book=book,
        store=store,
        storage=storage,
        spans=spans,
        retention=settings.retention,
        spot_checks=settings.spot_checks,
    )
    return runner, pool


async def _check_objects(store: JobStore, data_dir: Path) -> None:
    """The folder's datasets and checkpoints are this store's: another one would delete them as orphans.

    Raises Conflict `STORE_MISMATCH`.
    """
    path, found = data_dir / "store-id", await store.store_id()
    if not path.exists():
        path.write_text(found, encoding="ascii")
    if path.read_text(encoding="ascii").strip() != found:
        raise Conflict(
            "STORE_MISMATCH",
            "the data folder's datasets and checkpoints belong to another job store",
            where=str(path),
        )


def _kept_secret(path: Path) -> str:
    """One that devices join with, or that Ray asks for; made at first start, readable by its owner only."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private(path, secrets.token_urlsafe(32).encode())
    return path.read_text(encoding="ascii").strip()


async def _first_key(store: JobStore) -> str | None:
    """A key for a first tenant, when there is no tenant yet."""
    if await store.tenants():
        return None
    await store.create_tenant(FIRST_TENANT)
    return await store.create_key(FIRST_TENANT)
