"""The processes of a soak: `cola serve` with its base model on Ray, and `cola device`s, kept running.

Each device dials the coordinator, and through the base model's advertised address the base model, by way of a
proxy of bytes in this process, which cuts connections on demand. Whatever a kill ends is started again, as a
service manager would; whatever ends by itself is a problem.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import psutil
import yaml

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.process_environment import child_environment
from cola_runtime.testing.chaos import Chaos, FaultKind, Way
from cola_runtime.testing.chaos_proxy import byte_proxy
from cola_runtime.testing.soak_jobs import MODEL, TOKEN_BUDGET

LEASE_SECONDS = 5.0
HANG_SECONDS = LEASE_SECONDS + 3.0
START_SECONDS = 120.0
STOP_SECONDS = 40.0
RESTART_PAUSE_SECONDS = 0.5
SILENCE_SECONDS = 15.0
ORPHAN_SECONDS = 90.0
RAY_AGENTS = ("DashboardAgent", "RuntimeEnvAgent")
"""They look for a raylet that is gone and for a head to tell about it, and take about a minute for that."""
COORDINATOR = "coordinator"
BASE_MODEL = "base model"


class Fleet(Protocol):
    """A service's processes, as a soak sees and strikes them; False is that one did not run just now."""

    problems: list[str]

    @property
    def first_key(self) -> str: ...
    @property
    def data_dir(self) -> Path: ...
    @property
    def device_names(self) -> list[str]: ...
    def client(self, key: str) -> AsyncClient: ...
    def pids(self) -> dict[str, int]: ...
    def kill(self, role: str) -> bool: ...
    async def hang(self, role: str) -> bool: ...
    async def cut(self, link: str, way: Way) -> bool: ...


@dataclass(slots=True)
class Kept:
    """One process that is started again whenever it ends."""

    role: str
    command: list[str]
    log: Path
    process: asyncio.subprocess.Process | None = None
    killed: bool = False  # by us: its end is no problem
    keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        alive = self.process is not None and self.process.returncode is None
        return self.process.pid if alive and self.process is not None else None


@dataclass(slots=True)
class SoakFleet:
    """An async context manager; `problems` are sentences about what ended or stayed and should not have."""

    folder: Path
    model: Path
    devices: int
    ray_address: str | None = None  # of a cluster, where a base model may come up anywhere: it has no proxy
    problems: list[str] = field(default_factory=list)
    links: dict[str, Chaos] = field(default_factory=dict)
    endpoint: str = ""
    announced_key: str = ""
    _kept: dict[str, Kept] = field(default_factory=dict)
    _watching: set[asyncio.Task[None]] = field(default_factory=set)
    _closing: bool = False
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def first_key(self) -> str:
        return self.announced_key

    @property
    def data_dir(self) -> Path:
        return self.folder / "data"

    @property
    def device_names(self) -> list[str]:
        return [f"device-{index}" for index in range(self.devices)]

    async def __aenter__(self) -> SoakFleet:
        self.data_dir.mkdir(parents=True)
        self.endpoint, base = (f"127.0.0.1:{_free_port()}" for _ in range(2))
        self.links = {name: Chaos() for name in (COORDINATOR, BASE_MODEL)}
        to_coordinator, to_base = [
            await self._stack.enter_async_context(byte_proxy(endpoint, self.links[name]))
            for name, endpoint in ((COORDINATOR, self.endpoint), (BASE_MODEL, base))
        ]
        settings = self.folder / "settings.yaml"
        reached = {} if self.ray_address else {"bind": base, "advertise": to_base}
        settings.write_text(yaml.safe_dump(self._settings(reached)))
        cola = [sys.executable, "-m", "cola_runtime.cli.main"]
        self._keep(COORDINATOR, [*cola, "serve", "--json", "--file", str(settings)])
        try:
            self.announced_key = await self._announced()
        except BaseException:
            await self.__aexit__()
            raise
        for name in self.device_names:
            self._keep(name, [*cola, "device", "--coordinator", to_coordinator, "--id", name])
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Ask the coordinator to end, as its service manager would; nothing of it may be left."""
        self._closing = True
        below = self._descendants()
        coordinator = self._kept[COORDINATOR]
        if coordinator.process is not None and coordinator.pid is not None:
            coordinator.process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(coordinator.process.wait(), STOP_SECONDS)
        for kept in self._kept.values():
            if kept.keeper is not None:
                kept.keeper.cancel()
            if kept.pid is not None:
                _signal(kept.pid, signal.SIGCONT)
                _signal(kept.pid, signal.SIGKILL)
            if kept.process is not None:
                await kept.process.wait()
        for process in below:
            if any(agent in _name(process) for agent in RAY_AGENTS):
                _signal(process.pid, signal.SIGKILL)
        await self._expect_gone(below, "the end of the run")
        for task in self._watching:
            task.cancel()
        await self._stack.aclose()

    def client(self, key: str) -> AsyncClient:
        return AsyncClient(base_url=f"grpc://{self.endpoint}", api_key=key)

    def pids(self) -> dict[str, int]:
        """The processes that run now, by role."""
        found = {role: kept.pid for role, kept in self._kept.items()}
        found[BASE_MODEL] = self.base_model_pid()
        return {role: pid for role, pid in found.items() if pid is not None}

    def base_model_pid(self) -> int | None:
        return next((p.pid for p in self._descendants() if "BaseModelActor" in _name(p)), None)

    def kill(self, role: str) -> bool:
        """SIGKILL; False when it does not run just now."""
        pid = self.pids().get(role)
        if pid is None:
            return False
        if role == COORDINATOR:
            below = self._descendants()
            self._watching.add(asyncio.create_task(self._expect_gone(below, "the coordinator's death")))
        if role in self._kept:
            self._kept[role].killed = True
        return _signal(pid, signal.SIGKILL)

    async def terminate(self, role: str) -> int:
        """SIGTERM; the exit code. It is started again like one that was killed."""
        kept = self._kept[role]
        assert kept.process is not None
        kept.killed, ending = True, kept.process
        ending.terminate()
        return await ending.wait()

    async def hang(self, role: str) -> bool:
        """Stop a process for longer than its lease."""
        pid = self.pids().get(role)
        if pid is None or not _signal(pid, signal.SIGSTOP):
            return False
        try:
            await asyncio.sleep(HANG_SECONDS)
        finally:
            _signal(pid, signal.SIGCONT)
        return True

    async def cut(self, link: str, way: Way) -> bool:
        """Cut the connection that next carries something that way; False when none did for a while."""
        self.links[link].strike_next(FaultKind.CUT, way)
        try:
            await asyncio.wait_for(self.links[link].struck.wait(), SILENCE_SECONDS)
        except TimeoutError:
            return False
        return True

    def _settings(self, reached: Mapping[str, str]) -> dict[str, Any]:
        return {
            "data_dir": str(self.data_dir),
            "listen": self.endpoint,
            "ray_address": self.ray_address,
            "base_models": [{"name": MODEL, "path": str(self.model), "attention": "sdpa", **reached}],
            "devices": {"count": 0, "heartbeat_seconds": 0.5, "lease_timeout_seconds": LEASE_SECONDS},
            "scheduler": {"token_budget": TOKEN_BUDGET},
            "retention": {"keep_last": 3},
        }

    async def _announced(self) -> str:
        """The first key; Ray writes its workers' words around the service's line."""
        out = self.folder / f"{COORDINATOR}.out"
        async with asyncio.timeout(START_SECONDS):
            while True:
                lines = out.read_text(errors="replace").splitlines() if out.exists() else []
                told = [line for line in lines if line.startswith("{") and line.endswith("}")]
                if told:
                    return str(json.loads(told[0])["first_key"])
                await asyncio.sleep(0.1)

    def _keep(self, role: str, command: list[str]) -> None:
        kept = Kept(role=role, command=command, log=self.folder / f"{role}.log")
        kept.keeper = asyncio.create_task(self._keep_running(kept), name=role)
        self._kept[role] = kept

    async def _keep_running(self, kept: Kept) -> None:
        while True:
            with kept.log.open("ab") as log, (self.folder / f"{kept.role}.out").open("ab") as out:
                kept.process = await self._start(kept, out, log)
            returned = await kept.process.wait()
            if self._closing:
                return
            if not kept.killed:
                tail = kept.log.read_text(errors="replace")[-600:]
                self.problems.append(f"{kept.role} ended by itself with {returned}: ...{tail}")
            kept.killed = False
            await asyncio.sleep(RESTART_PAUSE_SECONDS)

    async def _start(self, kept: Kept, out: IO[bytes], log: IO[bytes]) -> asyncio.subprocess.Process:
        token = self.data_dir / "join-token"
        joining = token.read_text().strip() if token.exists() else ""
        return await asyncio.create_subprocess_exec(
            *kept.command,
            stdout=out,
            stderr=log,
            env=child_environment(OMP_NUM_THREADS="1", COLA_LOG="WARNING", COLA_JOIN_TOKEN=joining),
            start_new_session=True,  # Ray's clean-up is of its own process group
        )

    def _descendants(self) -> list[psutil.Process]:
        pid = self._kept[COORDINATOR].pid
        try:
            return [] if pid is None else psutil.Process(pid).children(recursive=True)
        except psutil.Error:
            return []

    async def _expect_gone(self, processes: list[psutil.Process], after: str) -> None:
        deadline = time.monotonic() + ORPHAN_SECONDS
        while left := [process for process in processes if _lives(process)]:
            if time.monotonic() > deadline:
                names = ", ".join(sorted(map(_name, left)))
                self.problems.append(f"{ORPHAN_SECONDS:g} s after {after} these are left: {names}")
                for process in left:
                    _signal(process.pid, signal.SIGKILL)
                return
            await asyncio.sleep(0.5)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        psutil.Process(pid).send_signal(number)
    except psutil.Error:
        return False
    return True


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
