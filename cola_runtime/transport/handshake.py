"""The first exchange on a device's stream: who it is, the join token, the protocol version."""

from __future__ import annotations

import hmac
import re
from typing import Any

from cola_runtime.errors import ProtocolError, Unauthenticated
from cola_runtime.proto import control_pb2
from cola_runtime.transport.frames import PROTOCOL_VERSION
from cola_runtime.transport.reader import FrameLimits
from cola_runtime.transport.stream import FrameStream, ReceivedControl

HELLO_SECONDS = 10.0

_DEVICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


async def receive_hello(
    stream: FrameStream[Any], *, join_token: str, limits: FrameLimits, timeout_seconds: float = HELLO_SECONDS
) -> Any:
    """The DeviceHello or GradientHello of a peer that knows the join token; it may send tensors from here on.

    Raises ProtocolError HELLO_EXPECTED, PROTOCOL_VERSION or DEVICE_ID_INVALID, Unauthenticated
    JOIN_TOKEN_WRONG, Unavailable when nothing came in time.
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
    if not hmac.compare_digest(hello.join_token.encode(), join_token.encode()):
        raise Unauthenticated("JOIN_TOKEN_WRONG", "the join token is not this service's")
    if not _DEVICE_ID.fullmatch(hello.device_id):
        raise ProtocolError("DEVICE_ID_INVALID", "a device id is 1 to 63 letters, digits, '.', '_' or '-'")
    stream.accept_tensors(limits)
    return hello


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
