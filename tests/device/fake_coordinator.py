"""The coordinator's end of the control streams, as small as a test needs: grants, checkpoints, failures."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import suppress
from typing import Any

import grpc

from cola_runtime.adapters.checkpoint_format import TrainingDefinition
from cola_runtime.errors import ColaError
from cola_runtime.proto import control_pb2
from cola_runtime.transport import control
from cola_runtime.transport.endpoints import DEVICES, serve_streams
from cola_runtime.transport.frames import DType, TensorAddress, WireTensor
from cola_runtime.transport.handshake import gradient_ticket, receive_hello
from cola_runtime.transport.reader import FrameLimits, ReceivedTensor
from cola_runtime.transport.stream import FrameStream
from cola_runtime.types import Lease, TensorKind

TOKEN = "join-secret"
WAIT_SECONDS = 20.0


class FakeCoordinator:
    """Accepts devices; remembers the newest checkpoint of every job."""

    def __init__(self, gradient_endpoint: str) -> None:
        self.gradient_endpoint = gradient_endpoint
        self.streams: dict[str, FrameStream[Any]] = {}
        self.joins = 0
        self.checkpoints: dict[str, tuple[int, bytes]] = {}
        self.failures: list[control_pb2.LeaseFailed] = []
        self.heartbeats: list[control_pb2.Heartbeat] = []
        self._changed = asyncio.Condition()
        self._server: grpc.aio.Server | None = None

    async def start(self, bind: str = "127.0.0.1:0") -> str:
        self._server, endpoint = await serve_streams(bind, {DEVICES: self._serve})
        return endpoint

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)

    async def until(self, condition: Any) -> None:
        """Wait until `condition()` holds after something has arrived."""
        async with asyncio.timeout(WAIT_SECONDS), self._changed:
            await self._changed.wait_for(condition)

    async def grant(
        self,
        lease: Lease,
        training: TrainingDefinition,
        *,
        checkpoint: bytes = b"",
        every: int = 0,
        shards: int = 1,
        max_staleness: int = 0,
        gradient_endpoint: str = "",
    ) -> None:
        await self.until(lambda: lease.device_id in self.streams)
        stream = self.streams[lease.device_id]
        if checkpoint:
            address = TensorAddress(job_id=lease.job_id, epoch=lease.epoch, version=0, kind=TensorKind.BLOB)
            blob = WireTensor(dtype=DType.UINT8, shape=(len(checkpoint),), data=memoryview(checkpoint))
            await stream.send_tensor(address, blob)
        await stream.send_control(
            control.lease_grant(
                lease,
                training.spec,
                optimizer=training.optimizer,
                schedule=training.schedule,
                checkpoint_bytes=len(checkpoint),
                checkpoint_every=every,
                gradient_endpoint=gradient_endpoint or self.gradient_endpoint,
                shards=shards,
                max_staleness=max_staleness,
            )
        )

    async def send(self, device_id: str, **message: Any) -> None:
        await self.streams[device_id].send_control(control_pb2.DeviceControl(**message))

    async def _serve(self, stream: FrameStream[Any]) -> None:
        async def check(hello: control_pb2.DeviceHello) -> None:
            assert hello.join_token == TOKEN

        hello = await receive_hello(stream, check=check, limits=FrameLimits())
        welcome = control_pb2.DeviceWelcome(
            heartbeat_seconds=0.05,
            gradient_ticket=gradient_ticket(TOKEN, hello.device_id),
        )
        await stream.send_control(control_pb2.DeviceControl(welcome=welcome))
        async with self._changed:
            self.streams[hello.device_id] = stream
            self.joins += 1
            self._changed.notify_all()
        try:
            with suppress(ColaError):
                await self._read(stream)
        finally:
            self.streams.pop(hello.device_id, None)

    async def _read(self, stream: FrameStream[Any]) -> None:
        blob = b""
        async for item in stream:
            if isinstance(item, ReceivedTensor):
                blob = bytes(item.data)
                continue
            async with self._changed:
                self._note(item.message, blob)
                self._changed.notify_all()

    def _note(self, message: control_pb2.DeviceControl, blob: bytes) -> None:
        if message.HasField("heartbeat"):
            self.heartbeats.append(message.heartbeat)
        elif message.HasField("lease_failed"):
            self.failures.append(message.lease_failed)
        elif message.HasField("checkpoint_made"):
            made = message.checkpoint_made
            assert (len(blob), hashlib.sha256(blob).hexdigest()) == (made.bytes, made.sha256)
            self.checkpoints[made.lease.job_id] = (made.version, blob)
