"""The SDK. Imports neither torch nor ray nor transformers.

    with Client() as client:
        spec = JobSpec(name="greeter", base_model="smollm2-135m-instruct")
        handle = client.submit(spec, training="rows.jsonl")
        handle.wait()
        handle.download_adapter("greeter-adapter")

`AsyncClient` and `AsyncJobHandle` have the same methods, to be awaited.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.client.loop_thread import LoopThread, Parameters, synchronous, synchronous_iterator
from cola_runtime.client.values import (
    AuditEntry,
    BaseModel,
    Checkpoint,
    DatasetReport,
    Device,
    Evaluation,
    Event,
    Generation,
    Job,
    JobEstimate,
    JoinToken,
    Key,
    NewKey,
    RegisteredDevice,
    Replica,
    Service,
    Step,
    Usage,
)
from cola_runtime.spec import JobSpec

__all__ = [
    "AsyncClient",
    "AsyncJobHandle",
    "AuditEntry",
    "BaseModel",
    "Checkpoint",
    "Client",
    "DatasetReport",
    "Device",
    "Evaluation",
    "Event",
    "Generation",
    "Job",
    "JobEstimate",
    "JobHandle",
    "JobSpec",
    "JoinToken",
    "Key",
    "NewKey",
    "RegisteredDevice",
    "Replica",
    "Service",
    "Step",
    "Usage",
]


class JobHandle:
    """One job of a client. `job` is how it stood when last asked."""

    def __init__(self, loop: LoopThread, twin: AsyncJobHandle) -> None:
        self._loop = loop
        self._twin = twin

    @property
    def job(self) -> Job:
        return self._twin.job

    @property
    def job_id(self) -> str:
        return self._twin.job_id

    @property
    def name(self) -> str:
        return self._twin.name

    refresh = synchronous(AsyncJobHandle.refresh)
    wait = synchronous(AsyncJobHandle.wait)
    events = synchronous_iterator(AsyncJobHandle.events)
    metrics = synchronous(AsyncJobHandle.metrics)
    evaluations = synchronous(AsyncJobHandle.evaluations)
    cancel = synchronous(AsyncJobHandle.cancel)
    pause = synchronous(AsyncJobHandle.pause)
    resume = synchronous(AsyncJobHandle.resume)
    checkpoints = synchronous(AsyncJobHandle.checkpoints)
    pin = synchronous(AsyncJobHandle.pin)
    unpin = synchronous(AsyncJobHandle.unpin)
    download_adapter = synchronous(AsyncJobHandle.download_adapter)
    generate = synchronous(AsyncJobHandle.generate)


def _giving_handle(
    method: Callable[Concatenate[Any, Parameters], Coroutine[Any, Any, AsyncJobHandle]],
) -> Callable[Concatenate[Any, Parameters], JobHandle]:
    def call(self: Any, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> JobHandle:
        return JobHandle(self._loop, self._loop.run(method(self._twin, *args, **kwargs)))

    functools.update_wrapper(call, method)
    return call


class Client:
    """A tenant's connection to a service. Every call may raise a ColaError (cola_runtime.errors).

    `base_url` and `api_key` default to COLA_BASE_URL and COLA_API_KEY, `ca` to COLA_CA. Safe to use from
    several threads.
    """

    def __init__(
        self, *, base_url: str | None = None, api_key: str | None = None, ca: Path | str | None = None
    ) -> None:
        self._twin = AsyncClient(base_url=base_url, api_key=api_key, ca=ca)
        self._loop = LoopThread()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; jobs go on."""
        self._loop.run(self._twin.close())
        self._loop.close()

    submit = _giving_handle(AsyncClient.submit)
    job = _giving_handle(AsyncClient.job)
    jobs = synchronous(AsyncClient.jobs)
    check_dataset = synchronous(AsyncClient.check_dataset)
    estimate = synchronous(AsyncClient.estimate)
    generate = synchronous(AsyncClient.generate)
    describe = synchronous(AsyncClient.describe)
    create_key = synchronous(AsyncClient.create_key)
    keys = synchronous(AsyncClient.keys)
    revoke_key = synchronous(AsyncClient.revoke_key)
    usage = synchronous(AsyncClient.usage)
    usage_of_all = synchronous(AsyncClient.usage_of_all)
    start_trace = synchronous(AsyncClient.start_trace)
    stop_trace = synchronous(AsyncClient.stop_trace)
    create_join_token = synchronous(AsyncClient.create_join_token)
    registered_devices = synchronous(AsyncClient.registered_devices)
    revoke_device = synchronous(AsyncClient.revoke_device)
    reinstate_device = synchronous(AsyncClient.reinstate_device)
    audit = synchronous(AsyncClient.audit)
