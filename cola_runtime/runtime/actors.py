"""Ray shells: each only forwards to a plain class. Ray places, restarts, carries small calls; no tensors."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cola_runtime import crash_points
from cola_runtime.adapter_spec import LeaseTerms
from cola_runtime.adapters.module_registry import import_adapter_modules
from cola_runtime.config import BaseModelSettings, HostSettings, JoinSettings, ServiceSettings, crash_setting
from cola_runtime.errors import Unavailable
from cola_runtime.machine import KEPT_ACTIVATION_BYTES, keep_freed_memory, keep_started_objects
from cola_runtime.process_environment import actor_environment, set_thread_environment
from cola_runtime.trace.spans import ProcessSpans
from cola_runtime.transport.certificates import Identity
from cola_runtime.types import (
    BaseEvent,
    BaseModelDescription,
    BaseStep,
    BaseStepResult,
    Lease,
)

T = TypeVar("T")


class BaseModelActor:
    """One replica of the base model. Holds nothing that cannot be rebuilt: Ray restarts it at will."""

    def __init__(
        self,
        settings: BaseModelSettings,
        cache_dir: Path,
        join_token: str,
        adapter_modules: Sequence[str],
        identity: Identity | None = None,
        *,
        hosts: HostSettings,
    ) -> None:
        self._identity, self._hosts = identity, hosts
        set_thread_environment(settings.threads)
        crash_points.arm(crash_setting())
        keep_freed_memory(KEPT_ACTIVATION_BYTES)
        from cola_runtime.base_model.kept_choice import KeptAttention
        from cola_runtime.base_model.model import TappedModel
        from cola_runtime.base_model.pretrained import resolve_base_model
        from cola_runtime.base_model.service import BaseModelService

        _quiet_transformers()
        import_adapter_modules(adapter_modules)
        path = settings.path or resolve_base_model(settings.name, cache_dir)
        kept = KeptAttention(cache_dir, path, dtype=settings.dtype, accelerator=settings.accelerator)
        model = TappedModel.load(
            path,
            dtype=settings.dtype,
            attention=kept.instead_of(settings.attention),
            threads=settings.threads,
            activation_checkpointing=settings.activation_checkpointing,
            tiled_weights=settings.tiled_weights,
            quantization=settings.quantization,
            accelerator=settings.accelerator,
            bank_bytes=settings.bank_bytes,
        )
        if settings.attention == "auto":
            kept.keep(model.tried_attention)
        keep_started_objects()
        self._service = BaseModelService(
            model, name=settings.name, join_token=join_token, retained_dir=cache_dir / "retained"
        )
        self._bind, self._advertise = settings.bind, settings.advertise
        self._endpoint: str | None = None

    async def describe(self) -> BaseModelDescription:
        """Also starts the gradient server; after a restart of the actor that is at a new endpoint."""
        if self._endpoint is None:
            from cola_runtime.transport.tls import device_port_credentials

            credentials = device_port_credentials(self._identity) if self._identity else None
            self._endpoint = await self._service.start(self._bind, credentials=credentials, hosts=self._hosts)
        description = await self._service.describe()
        return replace(description, gradient_endpoint=self._advertise or self._endpoint)

    async def lease(self, lease: Lease, terms: LeaseTerms) -> None:
        await self._service.lease(lease, terms)

    async def end_lease(self, job_id: str, epoch: int) -> None:
        await self._service.end_lease(job_id, epoch)

    async def forget_steps(self, job_id: str, epoch: int, *, before: int) -> None:
        await self._service.forget_steps(job_id, epoch, before=before)

    async def dismiss_device(self, device_id: str) -> None:
        await self._service.dismiss_device(device_id)

    async def run(self, step: BaseStep) -> BaseStepResult:
        return await self._service.run(step)

    async def next_events(self, after: int) -> tuple[int, list[BaseEvent]]:
        return await self._service.next_events(after)

    async def record_spans(self, on: bool) -> ProcessSpans:
        return await self._service.record_spans(on)

    async def generate(self, job_id: str | None, prompts: list[list[int]], **options: Any) -> list[list[int]]:
        return await self._service.generate(job_id, prompts, **options)


class DeviceActor:
    """One trusted device: dials in like any other, Ray only keeps it alive."""

    def __init__(self, settings: JoinSettings, device_id: str, identity: Identity | None) -> None:
        set_thread_environment(settings.threads)
        crash_points.arm(crash_setting())
        keep_freed_memory()
        import_adapter_modules(settings.adapter_modules)
        self._settings, self._device_id, self._identity = settings, device_id, identity

    async def run(self) -> None:
        """Serve leases until the actor ends."""
        from cola_runtime.device.agent import DeviceAgent
        from cola_runtime.device.config import DeviceConfig

        keep_started_objects()
        config = DeviceConfig(
            device_id=self._device_id,
            coordinator_endpoint=self._settings.coordinator,
            join_token=self._settings.join_token.get_secret_value(),
            identity=self._identity,
            threads=self._settings.threads,
            credit_bytes=self._settings.credit_bytes,
        )
        await DeviceAgent(config).run()


class RemoteBaseModel:
    """The base model port over a Ray actor handle. Ray's failures become Unavailable BASE_MODEL_LOST."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def describe(self) -> BaseModelDescription:
        return await _answer(self._handle.describe.remote())

    async def lease(self, lease: Lease, terms: LeaseTerms) -> None:
        await _answer(self._handle.lease.remote(lease, terms))

    async def end_lease(self, job_id: str, epoch: int) -> None:
        await _answer(self._handle.end_lease.remote(job_id, epoch))

    async def forget_steps(self, job_id: str, epoch: int, *, before: int) -> None:
        await _answer(self._handle.forget_steps.remote(job_id, epoch, before=before))

    async def dismiss_device(self, device_id: str) -> None:
        await _answer(self._handle.dismiss_device.remote(device_id))

    async def run(self, step: BaseStep) -> BaseStepResult:
        return await _answer(self._handle.run.remote(step))

    async def next_events(self, after: int) -> tuple[int, list[BaseEvent]]:
        return await _answer(self._handle.next_events.remote(after))

    async def record_spans(self, on: bool) -> ProcessSpans:
        return await _answer(self._handle.record_spans.remote(on))

    async def generate(
        self,
        job_id: str | None,
        prompts: Sequence[Sequence[int]],
        *,
        checkpoint: bytes | None,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        stop_ids: Sequence[int],
    ) -> list[list[int]]:
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        call = self._handle.generate.remote(
            job_id, list(map(list, prompts)), checkpoint=checkpoint, stop_ids=list(stop_ids), **options
        )
        return await _answer(call)


async def _answer(call: Awaitable[T]) -> T:
    try:
        return await call
    except RayTaskError as error:
        raise error.cause from error
    except RayActorError as error:
        raise Unavailable("BASE_MODEL_LOST", f"the base model actor is gone: {error}") from error
    except RayError as error:
        raise Unavailable("BASE_MODEL_LOST", f"Ray could not reach the base model actor: {error}") from error


def _quiet_transformers() -> None:
    """No progress bars or advice in the service's log; errors stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def base_model_handle(
    settings: ServiceSettings, chosen: BaseModelSettings, join_token: str, identity: Identity | None
) -> Any:
    """Place a replica of `chosen` on a node that offers the resource `cola_base_model`, and a GPU on cuda."""
    options = {
        "num_cpus": 0,
        "num_gpus": 1 if chosen.accelerator == "cuda" else 0,
        "resources": {"cola_base_model": 1},
        "max_restarts": -1,
        "max_concurrency": 64,
        "runtime_env": {"env_vars": actor_environment()},
    }
    return (
        ray.remote(BaseModelActor)
        .options(**options)
        .remote(
            chosen,
            settings.cache_dir.resolve(),
            join_token,
            settings.adapter_modules,
            identity,
            hosts=settings.hosts,
        )
    )


def device_handle(settings: JoinSettings, device_id: str, identity: Identity | None) -> Any:
    """Place one device actor on a node that offers a unit of the resource `cola_device`."""
    options = {
        "num_cpus": 0,
        "resources": {"cola_device": 1},
        "max_restarts": -1,
        "runtime_env": {"env_vars": actor_environment()},
    }
    return ray.remote(DeviceActor).options(**options).remote(settings, device_id, identity)
