"""The Ray cluster under a service: one on this machine, or an existing one at an address."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Literal

import ray
from pydantic import SecretStr
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # its stub is partial
from ray.exceptions import RayError

from cola_runtime.config import BaseModelSettings, JoinSettings, ServiceSettings
from cola_runtime.errors import ColaError, InvalidInput, Unavailable
from cola_runtime.process_environment import own_ray_environment
from cola_runtime.runtime.actors import RemoteBaseModel, base_model_handle, device_handle
from cola_runtime.runtime.certified import Identify, base_model_identity
from cola_runtime.runtime.head_watch import require_head
from cola_runtime.scheduler.ports import BaseModelPort
from cola_runtime.types import BaseModelDescription

logger = logging.getLogger(__name__)

BASE_MODEL_START_SECONDS = 300.0
DEVICE_RESTART_PAUSE_SECONDS = 0.5


class Cluster:
    """Owns the connection to Ray and the actors that this service placed. A context manager."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        self._base_models: list[Any] = []
        self._own = ExitStack()  # of a Ray of our own

    def __enter__(self) -> Cluster:
        if self._settings.ray_address:
            require_head(self._settings.ray_address)
            ray.init(address=self._settings.ray_address, configure_logging=False)
        else:
            self._start_own()
        try:
            for chosen in self._settings.base_models:
                chosen_accelerator(chosen, ray.cluster_resources())
        except ColaError:
            self._leave()
            raise
        return self

    def _start_own(self) -> None:
        """Ray read its environment when it was imported, perhaps long ago: it is told to look again."""
        with ExitStack() as unless_started:
            unless_started.enter_context(own_ray_environment(self._settings.ray_token))
            before = ray_constants.ENABLE_RAY_CLUSTER
            unless_started.callback(setattr, ray_constants, "ENABLE_RAY_CLUSTER", before)
            ray_constants.ENABLE_RAY_CLUSTER = False
            Config.initialize("")
            AuthenticationTokenLoader.instance().reset_cache()
            ray.init(
                address="local",
                num_cpus=0,  # actors are placed by the resources below; Ray keeps no idle workers for CPUs
                resources={
                    "cola_base_model": sum(chosen.replicas for chosen in self._settings.base_models),
                    "cola_device": max(1, self._settings.devices.count),
                },
                include_dashboard=False,
                configure_logging=False,
                object_store_memory=256 << 20,
            )
            self._own = unless_started.pop_all()

    def _leave(self) -> None:
        ray.shutdown()
        self._own.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._base_models:
            ray.kill(handle)
        self._leave()

    async def start_base_models(self, join_token: str) -> list[BaseModelPort]:
        """Place every replica of every base model and wait until all answer: the replicas in order.

        Those behind the first of a base model take its choice of an attention implementation, so that a job
        which moves among them keeps its numbers. Raises Unavailable with what lacks.
        """
        first = await asyncio.gather(
            *(self._start_replica(chosen, 0, join_token) for chosen in self._settings.base_models)
        )
        started: list[BaseModelPort] = []
        for chosen, (base, description) in zip(self._settings.base_models, first, strict=True):
            found = description.details["attention"]  # by a trial, or one of our own
            alike = chosen.model_copy(update={"attention": found} if found in ("eager", "sdpa") else {})
            others = (self._start_replica(alike, number, join_token) for number in range(1, chosen.replicas))
            started += [base, *(each for each, _ in await asyncio.gather(*others))]
        return started

    async def _start_replica(
        self, chosen: BaseModelSettings, number: int, join_token: str
    ) -> tuple[BaseModelPort, BaseModelDescription]:
        accelerator = chosen_accelerator(chosen, ray.cluster_resources())
        of_replica = chosen.of_replica(number).model_copy(update={"accelerator": accelerator})
        identity = base_model_identity(self._settings, of_replica)
        handle = base_model_handle(self._settings, of_replica, join_token, identity)
        self._base_models.append(handle)
        base = RemoteBaseModel(handle)
        try:
            async with asyncio.timeout(BASE_MODEL_START_SECONDS):
                return base, await base.describe()
        except TimeoutError as error:
            raise Unavailable(
                "BASE_MODEL_NOT_PLACED",
                f"replica {number} of base model {chosen.name} did not start within "
                f"{BASE_MODEL_START_SECONDS:g} s",
                remedy="A node must offer the Ray resource cola_base_model; see `ray status`.",
            ) from error

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


def chosen_accelerator(
    base_model: BaseModelSettings, resources: Mapping[str, float]
) -> Literal["cpu", "cuda"]:
    """Where the base model goes in a cluster with these resources.

    Raises InvalidInput `ACCELERATOR_MISSING` where cuda is asked for and no node offers one: Ray would wait.
    """
    asked, offered = base_model.accelerator, resources.get("GPU", 0) >= 1
    if asked == "cuda" and not offered:
        raise InvalidInput(
            "ACCELERATOR_MISSING",
            f"no node of the Ray cluster offers a GPU to base model {base_model.name}",
            where="base_models.accelerator",
            remedy="Set the base model's accelerator to cpu, or add a node with a GPU; see `ray status`.",
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
