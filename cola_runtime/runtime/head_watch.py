"""Whether Ray's head (its GCS) is still there. Without it nothing can be placed or restarted any more.

Ray's own answer comes after a minute, and ends the process from within: so the coordinator looks for itself,
and leaves before that with a reason. Its service manager starts it again, which is a start like any other.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable

import ray
import ray._raylet
from ray.exceptions import RayError

from cola_runtime.errors import Unavailable

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
CONNECT_SECONDS = 3.0
LOST_AFTER_SECONDS = 10.0
"""A head that keeps its state (docs/deploy.md) may be back within it; Ray then goes on by itself."""


def head_address() -> str:
    """host:port of the GCS that this process is connected to."""
    return str(ray.get_runtime_context().gcs_address)


def require_head(address: str) -> None:
    """Raises Unavailable `RAY_LOST` when nobody answers at host:port, at once: Ray would try for a while."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return  # `auto`: Ray finds it by itself
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise Unavailable("RAY_LOST", f"no head of Ray answers at {address}: {error}") from error


def cluster_at(address: str) -> str:
    """Which cluster answers at host:port: a head that lost its state comes back as another one."""
    return str(ray._raylet.GcsClient(address=address).cluster_id.hex())


async def head_lost(
    address: str,
    *,
    after_seconds: float = LOST_AFTER_SECONDS,
    identify: Callable[[str], str] = cluster_at,
) -> Unavailable:
    """Return once nobody has answered at the address for so long, or another cluster does, with RAY_LOST."""
    host, _, port = address.rpartition(":")
    own = await asyncio.to_thread(identify, address)
    heard, missed = time.monotonic(), False
    while True:
        there = own if await _answers(host.strip("[]"), int(port)) else None
        if there and missed:
            there = await _identified(identify, address)
        if there == own:
            heard, missed = time.monotonic(), False
        elif there:
            return Unavailable("RAY_LOST", f"Ray's head at {address} came back without its state")
        elif time.monotonic() - heard >= after_seconds:
            message = f"Ray's head at {address} has not answered for {after_seconds:g} s"
            return Unavailable("RAY_LOST", message)
        else:
            missed = True
            logger.warning("Ray's head at %s does not answer", address, extra={"event": "ray.no_answer"})
        await asyncio.sleep(LOOK_SECONDS)


async def _identified(identify: Callable[[str], str], address: str) -> str | None:
    try:
        return await asyncio.to_thread(identify, address)
    except (RayError, RuntimeError):  # it listens and does not serve yet
        return None


async def _answers(host: str, port: int) -> bool:
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.transport.abort()
    return True
