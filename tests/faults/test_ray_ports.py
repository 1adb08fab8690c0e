"""Ray runs whatever code its callers send: of a service's own Ray, no port answers anybody else."""

from __future__ import annotations

import asyncio
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path

import grpc
import psutil
import pytest

from cola_runtime.testing.soak_fleet import SoakFleet
from tests.faults.namespaces import cable

SECONDS = 60.0
SERVERS = ("gcs_server", "raylet", "ray::")
CALLS = (  # of each kind of server one that would tell, or run, something
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.ObjectManagerService/FreeObjects",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
)
TRY = "import socket; socket.create_connection(('{}', {}), 3); print('connected')"

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def _of_no_ray_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that ran in this process left its token's place in the environment, which children get."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@asynccontextmanager
async def served(folder: Path, model: Path) -> AsyncIterator[SoakFleet]:
    """`cola serve` with a Ray of its own, and a `cola device`, as processes."""
    async with SoakFleet(folder / "service", model, devices=1) as fleet:
        yield fleet


def rays_of(fleet: SoakFleet) -> list[psutil.Process]:
    """All processes that the service has started: Ray's, and its actors."""
    return psutil.Process(fleet.pids()["coordinator"]).children(recursive=True)


def listening(processes: Sequence[psutil.Process]) -> list[tuple[psutil.Process, str, int]]:
    return [
        (process, at.laddr.ip, at.laddr.port)
        for process in processes
        for at in process.net_connections("inet")
        if at.status == psutil.CONN_LISTEN
    ]


def is_loopback(address: str) -> bool:
    found = ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def grpc_ports(ports: Sequence[tuple[psutil.Process, str, int]]) -> list[tuple[str, int]]:
    """Of the GCS, the raylet and the actors, each with a name of its own; the agents speak HTTP, too."""
    named = [(process.name(), port) for process, _, port in ports]
    return [
        (f"{name}:{port}", port) for name, port in named if name.startswith(SERVERS) and "Agent" not in name
    ]


async def asks_for_the_token(port: int, token: str) -> bool | None:
    """A call that the port knows is refused without the token, and with it is not. None: it knows none."""
    for method in CALLS:
        without, with_token = await answer(port, method), await answer(port, method, token=token)
        if with_token is not grpc.StatusCode.UNIMPLEMENTED:
            refused = grpc.StatusCode.UNAUTHENTICATED
            return without is refused and with_token is not refused
    return None


async def answer(port: int, method: str, *, token: str = "") -> grpc.StatusCode:
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            await channel.unary_unary(method)(b"", metadata=metadata, timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


async def test_a_services_own_ray_listens_on_loopback_and_answers_nobody_without_its_token(
    model: Path, tmp_path: Path
) -> None:
    async with served(tmp_path, model) as fleet:
        ports = listening(rays_of(fleet))
        outside = [
            (process.name(), address, port) for process, address, port in ports if not is_loopback(address)
        ]
        assert outside == []
        secret = fleet.data_dir / "ray-token"
        token = secret.read_text()
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        asked = {name: await asks_for_the_token(port, token) for name, port in grpc_ports(ports)}
        ours = [name for name, answer in asked.items() if answer is None]
        assert [name for name in ours if "BaseModelActor" not in name] == [], "it serves gradients, too"
        assert all(answer for name, answer in asked.items() if name not in ours), asked
        assert {name.split(":")[0] for name in asked.keys() - set(ours)} >= {"gcs_server", "raylet", "ray"}
        device = psutil.Process(fleet.pids()["device-0"])
        assert not any(name.startswith("RAY_AUTH") for name in device.environ())
        assert token not in "".join(device.environ().values())


async def test_nothing_of_ray_can_be_dialled_from_a_devices_network(model: Path, tmp_path: Path) -> None:
    async with served(tmp_path, model) as fleet:
        with cable() as laid, socket.create_server((laid.host, 0)) as ours:
            control = await asyncio.to_thread(inside, laid.inside, laid.host, ours.getsockname()[1])
            assert "connected" in control, "the cable itself holds"
            for process, _, port in listening(rays_of(fleet)):
                told = await asyncio.to_thread(inside, laid.inside, laid.host, port)
                assert "ConnectionRefusedError" in told, process.name()


def inside(prefix: Sequence[str], host: str, port: int) -> str:
    """What comes of dialling from the device's network."""
    command = [*prefix, sys.executable, "-c", TRY.format(host, port)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    return found.stdout + found.stderr
