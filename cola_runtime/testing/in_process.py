"""A whole service in one event loop: real store, gRPC, base model and devices; no Ray, no processes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from cola_runtime.adapters.module_registry import import_adapter_modules
from cola_runtime.base_model.model import TappedModel
from cola_runtime.base_model.service import BaseModelService
from cola_runtime.config import BaseModelSettings, ServiceSettings
from cola_runtime.device.agent import DeviceAgent
from cola_runtime.device.config import DeviceConfig
from cola_runtime.runtime.certified import Identify, base_model_identity, no_identity
from cola_runtime.runtime.coordinator import RunningService, running_coordinator
from cola_runtime.transport.certificates import Identity
from cola_runtime.transport.tls import device_port_credentials

JOIN_TOKEN = "in-process"  # noqa: S105 (nothing outside this process joins)


@dataclass(slots=True)
class InProcessDevices:
    """The devices of an in-process service; a test may stop one and start another."""

    count: int
    identify: Identify = no_identity
    agents: dict[str, DeviceAgent] = field(default_factory=dict)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    async def start_certified(self, device_id: str, coordinator: str) -> None:
        self.start(device_id, coordinator, identity=await self.identify(device_id))

    def start(self, device_id: str, coordinator: str, *, identity: Identity | None = None) -> None:
        config = DeviceConfig(
            device_id=device_id,
            coordinator_endpoint=coordinator,
            join_token=JOIN_TOKEN,
            identity=identity,
            first_retry_seconds=0.05,
        )
        self.agents[device_id] = DeviceAgent(config)
        self.tasks[device_id] = asyncio.create_task(self.agents[device_id].run(), name=device_id)

    async def kill(self, device_id: str) -> None:
        """End a device without a goodbye."""
        self.agents.pop(device_id)
        task = self.tasks.pop(device_id)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    @asynccontextmanager
    async def running(self, coordinator: str, identify: Identify) -> AsyncIterator[None]:
        self.identify = identify
        for index in range(self.count):
            await self.start_certified(f"device-{index}", coordinator)
        try:
            yield
        finally:
            for device_id in list(self.tasks):
                await self.kill(device_id)


@asynccontextmanager
async def no_devices(_coordinator: str, _identify: Identify) -> AsyncIterator[None]:
    """For a service whose devices are other processes, or that needs none."""
    yield


@asynccontextmanager
async def running_base_models(settings: ServiceSettings) -> AsyncIterator[list[BaseModelService]]:
    """Every replica of all base models of the settings."""
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(running_replica(settings, chosen.of_replica(number)))
            for chosen in settings.base_models
            for number in range(chosen.replicas)
        ]


@asynccontextmanager
async def running_replica(
    settings: ServiceSettings, chosen: BaseModelSettings
) -> AsyncIterator[BaseModelService]:
    """One base model (its `path` must be set), serving devices on a free port."""
    assert chosen.path is not None, "an in-process service looks no alias up"
    model = TappedModel.load(
        chosen.path,
        dtype=chosen.dtype,
        attention=chosen.attention,
        threads=chosen.threads,
        activation_checkpointing=chosen.activation_checkpointing,
        tiled_weights=chosen.tiled_weights,
        quantization=chosen.quantization,
        accelerator=chosen.accelerator,
        bank_bytes=chosen.bank_bytes,
    )
    service = BaseModelService(
        model, name=chosen.name, join_token=JOIN_TOKEN, retained_dir=settings.data_dir / "retained"
    )
    identity = base_model_identity(settings, chosen)
    credentials = device_port_credentials(identity) if identity else None
    await service.start(chosen.bind, credentials=credentials, hosts=settings.hosts)
    try:
        yield service
    finally:
        await service.stop()


@asynccontextmanager
async def running_in_process(
    settings: ServiceSettings,
) -> AsyncIterator[tuple[RunningService, InProcessDevices]]:
    """The service that `settings` describe, for as long as the context lasts."""
    import_adapter_modules(settings.adapter_modules)
    devices = InProcessDevices(settings.devices.count)
    async with (
        running_base_models(settings) as bases,
        running_coordinator(settings, bases, JOIN_TOKEN, devices_at=devices.running) as service,
    ):
        yield service, devices
