"""Proxies that do harm: one of bytes for any TCP connection, one of frames for our gRPC streams.

A device dials the proxy instead of the base model or the coordinator. The proxy of bytes harms HTTP/2 as a
bad network would, and a hanging one passes no pings; the proxy of frames speaks gRPC at both ends, so that a
whole frame can be lost, doubled or swapped, which no network does and a faulty peer could.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc

from cola_runtime.testing.chaos import Chaos, Cut, HalfClosed, Way
from cola_runtime.transport.concurrency import until_first_ends
from cola_runtime.transport.endpoints import SERVER_OPTIONS, STREAM_OPTIONS
from cola_runtime.transport.frames import HEADER_BYTES, decode_header

CHUNK_BYTES = 64 << 10
SILENCE_SECONDS = 0.5  # without an answer, after which there is none

Send = Callable[[bytes], Awaitable[object]]


@asynccontextmanager
async def byte_proxy(upstream: str, chaos: Chaos) -> AsyncIterator[str]:
    """Pass TCP connections on to `upstream` (host:port); yields the proxy's own host:port."""
    connections: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            await _join(reader, writer, upstream, chaos)
        finally:
            connections.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


async def _join(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, upstream: str, chaos: Chaos
) -> None:
    host, _, port = upstream.rpartition(":")
    try:
        up_reader, up_writer = await asyncio.open_connection(host, int(port))
    except OSError:
        writer.transport.abort()
        return
    try:
        await asyncio.gather(
            _copy(reader, up_writer, Way.TO_SERVER, chaos), _copy(up_reader, writer, Way.TO_CLIENT, chaos)
        )
    except (Cut, OSError):
        pass
    finally:
        for end in (writer, up_writer):
            end.transport.abort()  # a reset, as of a host that is gone


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way, chaos: Chaos) -> None:
    with suppress(HalfClosed):
        while chunk := await reader.read(CHUNK_BYTES):
            for part in await chaos.pass_on(way, chunk):
                writer.write(part)
            await writer.drain()
    writer.write_eof()


async def play_bytes(endpoint: str, recorded: Sequence[bytes]) -> bytes:
    """Send bytes as they once came (`Recorder`); all that the server says until it hangs up or is silent."""
    host, _, port = endpoint.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    answer = b""
    try:
        with suppress(TimeoutError, ConnectionError):
            writer.writelines(recorded)
            await asyncio.wait_for(writer.drain(), SILENCE_SECONDS)
            while more := await asyncio.wait_for(reader.read(CHUNK_BYTES), SILENCE_SECONDS):
                answer += more
    finally:
        writer.transport.abort()
    return answer


class FrameProxy:
    """Serves every streaming method of `upstream` by calling it there."""

    def __init__(self, upstream: str, chaos: Chaos) -> None:
        self._chaos = chaos
        self._channel = grpc.aio.insecure_channel(upstream, options=STREAM_OPTIONS)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """As `grpc.GenericRpcHandler` asks."""

        async def pass_on(_: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
            call = self._channel.stream_stream(details.method)(metadata=details.invocation_metadata)
            try:
                await self._join(context, call)
            except Cut:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata()))
            finally:
                call.cancel()

        return grpc.stream_stream_rpc_method_handler(pass_on)

    async def close(self) -> None:
        await self._channel.close()

    async def _join(self, context: Any, call: Any) -> None:
        async def up() -> None:
            await self._copy(context.read, call.write, Way.TO_SERVER)
            await call.done_writing()
            await asyncio.get_running_loop().create_future()  # the server ends the stream, not its writer

        async def down() -> None:
            await self._copy(call.read, context.write, Way.TO_CLIENT)

        await until_first_ends(up(), down())

    async def _copy(self, read: Callable[[], Awaitable[Any]], write: Send, way: Way) -> None:
        with suppress(HalfClosed):
            while (message := await read()) is not grpc.aio.EOF:
                for frame in frames_of(message):
                    for part in await self._chaos.pass_on(way, frame):
                        await write(part)


@asynccontextmanager
async def frame_proxy(upstream: str, chaos: Chaos) -> AsyncIterator[str]:
    """Pass gRPC streams of frames on to `upstream` (host:port); yields the proxy's own host:port."""
    proxy = FrameProxy(upstream, chaos)
    server = grpc.aio.server(options=(*STREAM_OPTIONS, *SERVER_OPTIONS))
    server.add_generic_rpc_handlers((proxy,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
        await proxy.close()


def frames_of(message: bytes) -> Iterator[bytes]:
    """The frames that one stream message holds."""
    start = 0
    while start < len(message):
        end = start + HEADER_BYTES + decode_header(message, start).payload_bytes
        yield message[start:end]
        start = end
