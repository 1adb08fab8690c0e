"""The Ray cluster under a service: one on this machine, or an existing one at an address."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Literal

import ray
from pydantic import SecretStr
from ray.exceptions import RayError

from cola_runtime.config import JoinSettings, ServiceSettings
from cola_runtime.errors import ColaError, InvalidInput, Unavailable
from cola_runtime.runtime.actors import RemoteBaseModel, base_model_handle, device_handle
from cola_runtime.runtime.certified import Identify
from cola_runtime.runtime.head_watch import require_head
from cola_runtime.transport.certificates import Identity

logger = logging.getLogger(__name__)

BASE_MODEL_START_SECONDS = 300.0
DEVICE_RESTART_PAUSE_SECONDS = 0.5


class Cluster:
    """Owns the connection to Ray and the actors that this service placed. A context manager."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        self._base_model: Any = None
        self._accelerator: Literal["cpu", "cuda"] = "cpu"

    def __enter__(self) -> Cluster:
        if self._settings.ray_address:
            require_head(self._settings.ray_address)
            ray.init(address=self._settings.ray_address, configure_logging=False)
        else:
            ray.init(
                address="local",
                num_cpus=0,  # actors are placed by the resources below; Ray keeps no idle workers for CPUs
                resources={"cola_base_model": 1, "cola_device": max(1, self._settings.devices.count)},
                include_dashboard=False,
                configure_logging=False,
                object_store_memory=256 << 20,
            )
        try:
            self._accelerator = chosen_accelerator(self._settings, ray.cluster_resources())
        except ColaError:
            ray.shutdown()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._base_model is not None:
            ray.kill(self._base_model)
        ray.shutdown()

    async def start_base_model(self, join_token: str, *, identity: Identity | None) -> RemoteBaseModel:
        """Place the base model actor and wait until it answers. Raises Unavailable with what lacks."""
        self._base_model = base_model_handle(
            self._settings, join_token, identity, accelerator=self._accelerator
        )
        base = RemoteBaseModel(self._base_model)
        try:
            async with asyncio.timeout(BASE_MODEL_START_SECONDS):
                await base.describe()
        except TimeoutError as error:
            raise Unavailable(
                "BASE_MODEL_NOT_PLACED",
                f"the base model actor did not start within {BASE_MODEL_START_SECONDS:g} s",
                remedy="A node must offer the Ray resource cola_base_model; see `ray status`.",
            ) from error
        return base

    @asynccontextmanager
    async def running_devices(
        self, coordinator: str, *, join_token: str, identify: Identify
    ) -> AsyncIterator[None]:
        """The trusted devices; each is run again whenever its actor comes back from a crash."""
        settings = self._settings.devices
        join = JoinSettings(
            coordinator=coordinator,
            join_token=SecretStr(join_token),
            threads=settings.threads,
            credit_bytes=settings.credit_bytes,
            adapter_modules=self._settings.adapter_modules,
        )
        names = [f"device-{index}" for index in range(settings.count)]
        handles = [device_handle(join, name, await identify(name)) for name in names]
        keepers = [
            asyncio.create_task(_keep_running(handle, name), name=name)
            for handle, name in zip(handles, names, strict=True)
        ]
        try:
            yield
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)
            for handle in handles:
                ray.kill(handle)


def chosen_accelerator(settings: ServiceSettings, resources: Mapping[str, float]) -> Literal["cpu", "cuda"]:
    """Where the base model goes in a cluster with these resources.

    Raises InvalidInput `ACCELERATOR_MISSING` where cuda is asked for and no node offers one: Ray would wait.
    """
    asked, offered = settings.base_model.accelerator, resources.get("GPU", 0) >= 1
    if asked == "cuda" and not offered:
        raise InvalidInput(
            "ACCELERATOR_MISSING",
            "no node of the Ray cluster offers a GPU",
            where="base_model.accelerator",
            remedy="Set base_model.accelerator to cpu, or add a node with a GPU; see `ray status`.",
        )
    return "cuda" if offered and asked != "cpu" else "cpu"


async def _keep_running(handle: Any, device_id: str) -> None:
    while True:
        try:
            await handle.run.remote()
        except RayError as error:
            logger.warning(
                "device actor %s ended: %s", device_id, error, extra={"event": "device.actor_ended"}
            )
        await asyncio.sleep(DEVICE_RESTART_PAUSE_SECONDS)
