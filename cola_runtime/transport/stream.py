"""One long-lived bidirectional grpc.aio stream of frames: the same class at both ends.

Control messages and tensors arrive in the order they were sent. Small frames are coalesced: while one message
is being written, the frames queued meanwhile form the next one, up to `MAX_MESSAGE_BYTES`. The send queue is
bounded in bytes; a sender waits when the peer does not read. Reading is on demand, so that a slow reader
stops the peer through HTTP/2's own window.

How it stops: `close()` flushes with a deadline and half-closes; the peer's `receive()` then returns [].
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from cola_runtime.errors import ColaError, ProtocolError, Unavailable
from cola_runtime.transport.frames import (
    MAX_MESSAGE_BYTES,
    Frame,
    TensorAddress,
    WireTensor,
    control_frame,
    tensor_frames,
)
from cola_runtime.transport.packs import ReceivedPack
from cola_runtime.transport.reader import NO_TENSORS, ControlPayload, FrameLimits, FrameReader, ReceivedTensor
from cola_runtime.transport.status import error_from_rpc

SEND_QUEUE_BYTES = 4 << 20
CLOSE_SECONDS = 5.0

M = TypeVar("M", bound=Message)


class ReceivedControl(Generic[M]):
    """A control message and the bytes it took on the stream."""

    __slots__ = ("message", "wire_bytes")

    def __init__(self, message: M, wire_bytes: int) -> None:
        self.message = message
        self.wire_bytes = wire_bytes


Item = ReceivedTensor | ReceivedPack | ReceivedControl[M]

_LOST = (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError, asyncio.InvalidStateError)


class Pipe(Protocol):
    """What a client call and a server context share: ordered raw messages both ways."""

    async def read(self) -> Any: ...

    async def write(self, message: bytes) -> None: ...


class FrameStream(Generic[M]):
    """Frames over one pipe. `bytes_sent` and `bytes_received` count whole frames, headers included."""

    def __init__(
        self, pipe: Pipe, control_type: type[M], *, peer: str, certificate: bytes | None = None
    ) -> None:
        self.peer = peer
        self.certificate = certificate  # PEM, verified by TLS; None: the peer has shown none
        self.bytes_sent = 0
        self.bytes_received = 0
        self._pipe = pipe
        self._control_type = control_type
        self._reader = FrameReader(NO_TENSORS)
        self._unread: list[Item[M]] = []
        self._frames: deque[Frame] = deque()
        self._queued_bytes = 0
        self._failure: ColaError | None = None
        self._changed = asyncio.Event()  # set for the writer: a frame was queued, or the stream closes
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []  # senders, each until the queue is below
        self._closed = asyncio.Event()
        self._writer = asyncio.create_task(self._write_forever(), name=f"frame writer to {peer}")

    def accept_tensors(self, limits: FrameLimits) -> None:
        """Allow tensors from now on; a peer that has not said who it is may only send control messages."""
        self._reader.limits = limits

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait in the send queue."""
        return self._queued_bytes

    async def send_control(self, message: M) -> int:
        """Queue a control message; returns its bytes on the stream. Raises Unavailable on a lost stream."""
        return await self._queue(control_frame(message.SerializeToString()))

    async def send_tensor(self, address: TensorAddress, tensor: WireTensor) -> int:
        """Queue a tensor's frames, waiting for room; its memory must not change before it was written."""
        return await self.send_frames(tensor_frames(address, tensor))

    async def send_frames(self, frames: Iterable[Frame]) -> int:
        """Queue frames, waiting for room; what they view must not change before they were written."""
        sent = 0
        for frame in frames:
            sent += await self._queue(frame)
        return sent

    async def receive(self, *, timeout_seconds: float | None = None) -> list[Item[M]]:
        """Everything that one stream message completes (one item at least); [] when the peer has closed.

        Raises ProtocolError for a bad frame, Unavailable when the stream is lost or after `timeout_seconds`.
        """
        if self._unread:
            return self.take_unread()
        while (message := await self._message_in_time(timeout_seconds)) is not None:
            items = self.decode(message)
            if items:
                return items
        return []

    async def receive_message(self, *, timeout_seconds: float | None = None) -> bytes | None:
        """The next message as it came, for `decode`; None when the peer has closed.

        Raises Unavailable as `receive` does. What `receive_one` left unread is not in it: see `take_unread`.
        Since another thread may decode, how old a tensor is is seen when its next message is decoded.
        """
        message = await self._read(timeout_seconds)
        if message is grpc.aio.EOF:
            return None
        self.bytes_received += len(message)
        return bytes(message)

    def decode(self, message: bytes) -> list[Item[M]]:
        """Everything that the next message completes. Any one thread may do it, message by message in order.

        Raises ProtocolError for a bad frame.
        """
        return [
            self._parse(item.payload, item.wire_bytes) if isinstance(item, ControlPayload) else item
            for item in self._reader.feed(message)
        ]

    def take_unread(self) -> list[Item[M]]:
        """What came together with the item that `receive_one` returned."""
        items, self._unread = self._unread, []
        return items

    async def receive_one(self, *, timeout_seconds: float) -> Item[M] | None:
        """The next item alone, None when the peer has closed; what came with it waits for `receive()`."""
        items = await self.receive(timeout_seconds=timeout_seconds)
        self._unread = items[1:]
        return items[0] if items else None

    async def __aiter__(self) -> AsyncIterator[Item[M]]:
        while items := await self.receive():
            for item in items:
                yield item

    async def flush(self, *, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Wait until everything queued was handed to gRPC."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._wait_below(1)
        except TimeoutError as error:
            raise Unavailable("STREAM_STALLED", f"{self.peer} does not read") from error
        if self._failure is not None:
            raise self._failure

    async def close(self) -> None:
        """Flush what is queued, end the stream. Safe to call twice, and while another task receives."""
        with suppress(ColaError):
            await self.flush()
        self._writer.cancel()
        await asyncio.wait({self._writer})  # not itself: that could swallow our own cancellation
        self._fail(Unavailable("STREAM_CLOSED", f"the stream to {self.peer} is closed"))
        self._closed.set()

    async def wait_closed(self) -> None:
        """Return once this end was closed."""
        await self._closed.wait()

    async def _message_in_time(self, timeout_seconds: float | None) -> bytes | None:
        """As `receive_message`; while a tensor is incomplete, not for longer than one may take."""
        if timeout_seconds is not None or not self._reader.incomplete:
            return await self.receive_message(timeout_seconds=timeout_seconds)
        try:
            return await self.receive_message(timeout_seconds=self._reader.limits.tensor_seconds)
        except Unavailable as error:
            if error.reason == "STREAM_SILENT":
                self._reader.check_age()
            raise

    async def _read(self, timeout_seconds: float | None) -> Any:
        try:
            async with asyncio.timeout(timeout_seconds):
                return await self._pipe.read()
        except TimeoutError as error:
            raise Unavailable("STREAM_SILENT", f"{self.peer} sent nothing for {timeout_seconds} s") from error
        except _LOST as error:
            raise _stream_lost(self.peer, error) from error

    def _parse(self, payload: bytes, wire_bytes: int) -> ReceivedControl[M]:
        try:
            return ReceivedControl(self._control_type.FromString(payload), wire_bytes)
        except DecodeError as error:
            name = self._control_type.__name__
            raise ProtocolError("CONTROL_INVALID", f"not a {name} message") from error

    async def _queue(self, frame: Frame) -> int:
        frame_bytes = sum(map(len, frame))
        if self._queued_bytes >= SEND_QUEUE_BYTES:
            await self._wait_below(SEND_QUEUE_BYTES)
        if self._failure is not None:
            raise self._failure
        self._frames.append(frame)
        self._queued_bytes += frame_bytes
        self._changed.set()
        return frame_bytes

    async def _wait_below(self, limit_bytes: int) -> None:
        while self._queued_bytes >= limit_bytes:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append((limit_bytes, waiter))
            await waiter

    def _wake_senders(self) -> None:
        """Those whose limit the queue is below; a message takes no turn of the loop for the others."""
        waiting, self._waiting = self._waiting, []
        for limit_bytes, waiter in waiting:
            if self._queued_bytes >= limit_bytes:
                self._waiting.append((limit_bytes, waiter))
            elif not waiter.done():
                waiter.set_result(None)

    async def _write_forever(self) -> None:
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                while self._frames:
                    await self._write_one()
        except (
            grpc.RpcError,
            grpc.aio.UsageError,
            grpc.aio.InternalError,
            asyncio.InvalidStateError,
        ) as error:
            self._fail(_stream_lost(self.peer, error))

    async def _write_one(self) -> None:
        message = self._next_message()
        await self._pipe.write(message)
        self.bytes_sent += len(message)
        self._queued_bytes -= len(message)
        self._wake_senders()

    def _next_message(self) -> bytes:
        parts: list[bytes | memoryview] = []
        message_bytes = 0
        while self._frames:
            message_bytes += sum(map(len, self._frames[0]))
            if parts and message_bytes > MAX_MESSAGE_BYTES:
                break
            parts += self._frames.popleft()
        return b"".join(parts)

    def _fail(self, failure: ColaError) -> None:
        """Wake every waiting sender; the first failure is the one that all of them see."""
        self._failure = self._failure or failure
        self._frames.clear()
        self._queued_bytes = 0
        self._wake_senders()


def _stream_lost(peer: str, error: BaseException) -> ColaError:
    if isinstance(error, grpc.aio.AioRpcError) and error.code() not in (None, grpc.StatusCode.OK):
        return error_from_rpc(error)
    return Unavailable("STREAM_LOST", f"the stream to {peer} was lost: {error}")
