"""Where frame streams begin: the server that accepts them and the client that dials.

Both ends ping every 10 s on an otherwise silent connection and give it up 5 s later, so that a peer that
hangs or a route that drops packets is noticed within 15 s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from cola_runtime.errors import Unavailable
from cola_runtime.proto import control_pb2
from cola_runtime.transport.concurrency import until_first_ends
from cola_runtime.transport.frames import MAX_MESSAGE_BYTES
from cola_runtime.transport.status import abort_with
from cola_runtime.transport.stream import FrameStream
from cola_runtime.transport.tls import bind_port, check_floor, peer_certificate

CONNECT_SECONDS = 10.0
HALF_CLOSED_SECONDS = 1.0
KEEPALIVE_MILLISECONDS = 10_000
KEEPALIVE_TIMEOUT_MILLISECONDS = 5_000
RECONNECT_MILLISECONDS = 500  # gRPC's own pauses grow to two minutes, over which a service has long come back

SHARED_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", KEEPALIVE_MILLISECONDS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MILLISECONDS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
STREAM_OPTIONS: tuple[tuple[str, int], ...] = (
    *SHARED_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", RECONNECT_MILLISECONDS),
    ("grpc.max_reconnect_backoff_ms", RECONNECT_MILLISECONDS),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
HOSTILE_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.absolute_max_metadata_size", 32 << 10),
    ("grpc.server_handshake_timeout_ms", 10_000),  # of TLS and of HTTP/2's first frames
    ("grpc.max_connection_idle_ms", 600_000),  # without a call; a client's next one dials again
    ("grpc.max_allowed_incoming_connections", 4096),
)
"""Of every port: what one peer may hold without saying who it is."""
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MILLISECONDS // 2),
    # A network that delays may bunch a few honest pings; a flood is thousands.
    ("grpc.http2.max_ping_strikes", 20),
    *HOSTILE_OPTIONS,
    ("grpc.so_reuseport", 0),
)

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class StreamMethod:
    """A bidirectional method whose messages are frames, and the type of its control messages."""

    service: str
    name: str
    control_type: type[Message]

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"


GRADIENTS = StreamMethod("cola.v1.Gradients", "Attach", control_pb2.GradientControl)
DEVICES = StreamMethod("cola.v1.Devices", "Attach", control_pb2.DeviceControl)

OnStream = Callable[[FrameStream[Any]], Coroutine[Any, Any, None]]


def add_stream_method(server: grpc.aio.Server, method: StreamMethod, on_stream: OnStream) -> None:
    """Serve `method` on `server`: `on_stream` runs once per stream, and the stream ends when it returns.

    What it raises becomes the stream's status. It is cancelled when the peer goes away or someone else closes
    the stream: clean up in finally.
    """

    async def attach(_: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        stream: FrameStream[Any] = FrameStream(
            context, method.control_type, peer=context.peer(), certificate=peer_certificate(context)
        )
        try:
            await until_first_ends(on_stream(stream), stream.wait_closed())
        except Exception as error:
            await stream.close()  # first: a message that is still being written is in the way of the status
            await abort_with(context, error)
        finally:
            await stream.close()

    handler = grpc.stream_stream_rpc_method_handler(attach)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(method.service, {method.name: handler}),)
    )


async def serve_streams(
    bind: str,
    methods: dict[StreamMethod, OnStream],
    *,
    credentials: grpc.ServerCredentials | None = None,
    where: str = "bind",
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> tuple[grpc.aio.Server, str]:
    """A started server and its endpoint (`host:port`, also for port 0). Stop it with `server.stop(grace)`.

    `where` names the setting that `bind` is from. Raises InvalidInput `PLAINTEXT_REFUSED` off loopback
    without credentials, Unavailable `PORT_IN_USE`, `TLS_FLOOR`.
    """
    server = grpc.aio.server(options=(*STREAM_OPTIONS, *SERVER_OPTIONS), interceptors=tuple(interceptors))
    for method, on_stream in methods.items():
        add_stream_method(server, method, on_stream)
    port = await bind_port(server, bind, credentials=credentials, where=where)
    await server.start()
    endpoint = f"{bind.rpartition(':')[0]}:{port}"
    if credentials is not None:
        await check_floor(endpoint)
    return server, endpoint


class Connection(FrameStream[M]):
    """The dialling end of a stream; owns its channel."""

    def __init__(self, channel: grpc.aio.Channel, method: StreamMethod, *, peer: str) -> None:
        self._channel = channel
        self._call = channel.stream_stream(method.path)()
        super().__init__(self._call, method.control_type, peer=peer)  # type: ignore[arg-type]

    async def close(self) -> None:
        """Flush, half-close and give the channel back."""
        await super().close()
        # A cancel would overtake what is still under way, so the peer is given time to read to the end.
        with suppress(grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError, TimeoutError):
            await self._call.done_writing()
            async with asyncio.timeout(HALF_CLOSED_SECONDS):
                await self._call.code()
        self._call.cancel()
        await self._channel.close()


async def connect(
    endpoint: str,
    method: StreamMethod,
    *,
    timeout_seconds: float = CONNECT_SECONDS,
    credentials: grpc.ChannelCredentials | None = None,
) -> Connection[Any]:
    """Dial and open one stream. Raises Unavailable ENDPOINT_UNREACHABLE after `timeout_seconds`."""
    if credentials is None:
        channel = grpc.aio.insecure_channel(endpoint, options=STREAM_OPTIONS)
    else:
        channel = grpc.aio.secure_channel(endpoint, credentials, options=STREAM_OPTIONS)
    try:
        async with asyncio.timeout(timeout_seconds):
            await channel.channel_ready()
    except BaseException as error:
        await channel.close()
        if isinstance(error, TimeoutError):
            raise Unavailable(
                "ENDPOINT_UNREACHABLE",
                f"no connection to {endpoint} within {timeout_seconds:g} s",
                remedy="Check the address and that the service runs.",
            ) from error
        raise
    return Connection(channel, method, peer=endpoint)
