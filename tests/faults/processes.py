"""A coordinator and devices as processes of their own, which die, hang and come back."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.config import DeviceSettings, RetentionSettings, ServiceSettings
from cola_runtime.device.config import DeviceConfig
from cola_runtime.errors import ColaError, Unavailable
from cola_runtime.testing.exactness import MixedJob, service_for
from cola_runtime.testing.in_process import JOIN_TOKEN
from tests.faults.judging import MODEL, WAIT_SECONDS

PROGRAM = Path(__file__).with_name("zygote.py")
START_SECONDS = 120.0
LOOK_AGAIN_SECONDS = 0.02


class Zygote:
    """Forks quickly what takes seconds to import."""

    def __init__(self, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def fork(self, **order: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@dataclass(slots=True)
class Fleet:
    """One service's processes. `faults` holds the moments at which something was done to them."""

    zygote: Zygote
    settings: ServiceSettings
    faults: list[float] = field(default_factory=list)
    coordinator: int = 0
    devices: dict[str, int] = field(default_factory=dict)
    _numbers: Any = field(default_factory=itertools.count)

    async def start_coordinator(self, *, crash: str | None = None) -> None:
        """Return when it serves, or when it has died of its crash point already."""
        ready = self.settings.data_dir / f"ready-{next(self._numbers)}"
        self.coordinator = self.zygote.fork(
            role="coordinator",
            settings=self.settings.model_dump_json(),
            crash=crash,
            ready=str(ready),
            log=str(self.settings.data_dir / "coordinator.log"),
        )
        async with asyncio.timeout(START_SECONDS):
            await until(lambda: ready.exists() or not alive(self.coordinator))

    def start_device(self, device_id: str, *, crash: str | None = None) -> None:
        config = DeviceConfig(
            device_id=device_id,
            coordinator_endpoint=self.settings.listen,
            join_token=JOIN_TOKEN,
            first_retry_seconds=0.1,
            last_retry_seconds=1.0,
        )
        self.devices[device_id] = self.zygote.fork(
            role="device",
            config=asdict(config),
            crash=crash,
            log=str(self.settings.data_dir / f"{device_id}.log"),
        )

    def kill(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        self.faults.append(time.time())
        os.kill(pid, number)

    async def died(self, pid: int, marker: Path) -> None:
        """Wait until a process has died at the crash point that the marker is of."""
        async with asyncio.timeout(START_SECONDS):
            await until(lambda: marker.exists() and not alive(pid))
        self.faults.append(await asyncio.to_thread(os.path.getmtime, marker))

    def client(self) -> AsyncClient:
        key = (self.settings.data_dir / "key").read_text()
        return AsyncClient(base_url=f"grpc://{self.settings.listen}", api_key=key)

    def end(self) -> None:
        for pid in (self.coordinator, *self.devices.values()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)


@asynccontextmanager
async def fleet(zygote: Zygote, folder: Path, model: Path, *, devices: int = 1) -> AsyncIterator[Fleet]:
    """Nothing runs yet; whatever does at the end is killed."""
    settings = service_for(folder, model=model, name=MODEL, dtype="float32").model_copy(
        update={
            "listen": f"127.0.0.1:{free_port()}",
            "retention": RetentionSettings(keep_last=2),
            "devices": DeviceSettings(count=devices, heartbeat_seconds=0.5, lease_timeout_seconds=5.0),
        }
    )
    running = Fleet(zygote, settings)
    try:
        yield running
    finally:
        running.end()


async def until(condition: Callable[[], bool]) -> None:
    """Of another process nothing tells; so look."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(LOOK_AGAIN_SECONDS)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def submit(client: AsyncClient, job: MixedJob) -> AsyncJobHandle:
    """One job, however often the coordinator dies of it: the request is the same each time."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            try:
                return await client.submit(
                    job.spec, training=job.training, evaluation=job.training, idempotency_key="the-job"
                )
            except Unavailable:
                await asyncio.sleep(0.1)


async def finish(client: AsyncClient, job_id: str) -> AsyncJobHandle:
    """Wait until the job has succeeded, over every restart of the coordinator."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            try:
                handle = await client.job(job_id)
                await handle.wait(WAIT_SECONDS)
                return handle
            except Unavailable:
                await asyncio.sleep(0.1)


async def reach(handle: AsyncJobHandle, version: int) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            with suppress(ColaError):
                if (await handle.refresh()).version >= version:
                    return
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
