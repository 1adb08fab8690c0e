"""The first exchange on a device's stream: who it is, what lets it in, the protocol version."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from cola_runtime.errors import ProtocolError, Unauthenticated
from cola_runtime.proto import control_pb2
from cola_runtime.transport.certificates import read_certificate
from cola_runtime.transport.frames import PROTOCOL_VERSION
from cola_runtime.transport.host_calls import caller_known
from cola_runtime.transport.reader import FrameLimits
from cola_runtime.transport.stream import FrameStream, ReceivedControl

HELLO_SECONDS = 10.0
TICKET_SECONDS = 3600  # for opening gradient streams; one that is open stays

DEVICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

Check = Callable[[Any], Awaitable[object]]
"""Raises unless the hello's device may come in."""


async def receive_hello(
    stream: FrameStream[Any], *, check: Check, limits: FrameLimits, timeout_seconds: float = HELLO_SECONDS
) -> Any:
    """The DeviceHello or GradientHello of a peer that `check` let in; it may send tensors from here on.

    Raises ProtocolError HELLO_EXPECTED, PROTOCOL_VERSION or DEVICE_ID_INVALID, Unavailable when nothing came
    in time, and whatever `check` raises.
    """
    hello = await _receive_single(stream, "hello", timeout_seconds)
    if hello.protocol_version != PROTOCOL_VERSION:
        raise ProtocolError(
            "PROTOCOL_VERSION",
            "this device speaks another protocol version",
            limit=PROTOCOL_VERSION,
            actual=hello.protocol_version,
            remedy="Install the same release on the device.",
        )
    check_device_id(hello.device_id)
    await check(hello)
    caller_known()
    stream.accept_tensors(limits)
    return hello


def check_device_id(device_id: str) -> None:
    if not DEVICE_ID.fullmatch(device_id):
        raise ProtocolError("DEVICE_ID_INVALID", "a device id is 1 to 63 letters, digits, '.', '_' or '-'")


def gradient_ticket(secret: str, device_id: str, *, now: float | None = None) -> str:
    """What the coordinator gives a device that it let in, and the base model takes from that device only."""
    until = int((time.time() if now is None else now) + TICKET_SECONDS)
    return f"{until}.{_mac(secret, device_id, until)}"


def check_ticket(
    secret: str, hello: control_pb2.GradientHello, certificate: bytes | None, *, since: float = 0.0
) -> None:
    """Raises Unauthenticated `TICKET_WRONG`, or `DEVICE_ID_MISMATCH` for another device's certificate.

    A ticket that was given out by `since` (time.time()) is wrong, too.
    """
    if certificate is not None and read_certificate(certificate).name != hello.device_id:
        raise Unauthenticated("DEVICE_ID_MISMATCH", "the certificate is another device's")
    until, _, mac = hello.ticket.partition(".")
    moment = int(until) if until.isascii() and until.isdigit() and len(until) < 16 else 0
    expected = _mac(secret, hello.device_id, moment)
    too_old = moment < time.time() or moment - TICKET_SECONDS <= since
    if not hmac.compare_digest(mac.encode(), expected.encode()) or too_old:
        raise Unauthenticated(
            "TICKET_WRONG",
            "the gradient ticket is not this device's, or has expired",
            remedy="The device asks the coordinator for another by itself.",
        )


def _mac(secret: str, device_id: str, until: int) -> str:
    return hmac.new(secret.encode(), f"{until}\n{device_id}".encode(), hashlib.sha256).hexdigest()


async def introduce(
    stream: FrameStream[Any],
    hello: control_pb2.DeviceControl | control_pb2.GradientControl,
    *,
    limits: FrameLimits,
    timeout_seconds: float = HELLO_SECONDS,
) -> Any:
    """Send the hello, return the peer's welcome. Raises what the peer refused it with."""
    stream.accept_tensors(limits)
    await stream.send_control(hello)
    return await _receive_single(stream, "welcome", timeout_seconds)


async def _receive_single(stream: FrameStream[Any], field: str, timeout_seconds: float) -> Any:
    item = await stream.receive_one(timeout_seconds=timeout_seconds)
    name = item.message.WhichOneof("message") if isinstance(item, ReceivedControl) else "no control message"
    if not isinstance(item, ReceivedControl) or name != field:
        raise ProtocolError("HELLO_EXPECTED", f"the first message of a stream is its {field}, got {name}")
    return getattr(item.message, field)
