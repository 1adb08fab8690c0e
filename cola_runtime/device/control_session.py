"""What a device does while one control stream lives: leases, heartbeats, checkpoints, gradient streams."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from cola_runtime import crash_points
from cola_runtime.device.answers import Answer, Checkpoint, Norms, Refused
from cola_runtime.device.config import DeviceConfig
from cola_runtime.device.gradient_link import GradientLink
from cola_runtime.device.gradient_links import GradientLinks
from cola_runtime.device.memory import OUT_OF_MEMORY
from cola_runtime.device.worker import DeviceWorker
from cola_runtime.errors import ProtocolError, Unavailable
from cola_runtime.proto import control_pb2
from cola_runtime.transport import control
from cola_runtime.transport.concurrency import until_first_ends
from cola_runtime.transport.endpoints import Connection
from cola_runtime.transport.frames import DType, TensorAddress, WireTensor
from cola_runtime.transport.reader import ReceivedTensor
from cola_runtime.transport.span_messages import recorded_spans
from cola_runtime.transport.stream import ReceivedControl
from cola_runtime.types import Lease, TensorKind

if TYPE_CHECKING:
    import grpc

T = TypeVar("T")

logger = logging.getLogger(__name__)


class ControlSession:
    """Serves the leases of one control stream. Every adapter's work goes through the one worker thread."""

    def __init__(
        self,
        config: DeviceConfig,
        stream: Connection[Any],
        welcome: control_pb2.DeviceWelcome,
        *,
        worker: DeviceWorker,
        thread: ThreadPoolExecutor,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._config = config
        self._stream = stream
        self._welcome = welcome
        self._worker = worker
        self._thread = thread
        self._links = GradientLinks(
            config,
            ticket=welcome.gradient_ticket,
            credentials=credentials,
            current=lambda job_ids: self._in_thread(lambda: worker.current(job_ids)),
            on_messages=self._on_messages,
        )
        self._blobs: dict[tuple[str, int], bytes] = {}  # checkpoints that wait for their grant
        self._checkpoints: asyncio.Queue[Checkpoint] = asyncio.Queue(maxsize=2)
        self._draining = False
        self._released = asyncio.Event()  # set at the end of each lease

    async def run(self) -> None:
        """Until the control stream ends. Raises what ended it."""
        await until_first_ends(
            self._read_control(), self._send_heartbeats(), self._links.run(), self._send_checkpoints()
        )

    async def drain(self) -> None:
        """Take no new leases, and return when the coordinator has taken back those that are held."""
        self._draining = True
        await self._stream.send_control(control_pb2.DeviceControl(drain=control_pb2.Drain()))
        while not self._worker.idle:
            self._released.clear()
            await self._released.wait()

    async def _read_control(self) -> None:
        async for item in self._stream:
            if isinstance(item, ReceivedControl):
                await self._control(item.message)
            elif isinstance(item, ReceivedTensor):
                self._keep_blob(item)
        raise Unavailable("STREAM_LOST", "the coordinator closed the control stream")

    def _keep_blob(self, item: ReceivedTensor) -> None:
        if item.address.kind is not TensorKind.BLOB or item.dtype is not DType.UINT8:
            raise ProtocolError("TENSOR_INVALID", "only checkpoints travel on the control stream")
        self._blobs[item.address.job_id, item.address.epoch] = bytes(item.data)

    async def _control(self, message: control_pb2.DeviceControl) -> None:
        kind = message.WhichOneof("message")
        if kind == "lease_grant":
            await self._grant(message.lease_grant)
        elif kind == "lease_end":
            lease = control.lease_from_proto(message.lease_end.lease)
            self._links.end(lease)
            await self._in_thread(lambda: self._worker.end(lease))
            self._released.set()
        elif kind == "checkpoint_request":
            await self._checkpoint(control.lease_from_proto(message.checkpoint_request.lease))
        elif kind == "drain":
            self._draining = True
        elif kind == "record_spans":
            await self._record_spans(message.record_spans.on)
        else:
            raise ProtocolError("CONTROL_INVALID", f"a coordinator does not send {kind}")

    async def _record_spans(self, on: bool) -> None:
        """Answered at once, so that the coordinator learns this process's clock."""
        recorded = self._worker.spans.switch(on, now=time.monotonic())
        for message in recorded_spans(recorded):
            await self._stream.send_control(message)

    async def _grant(self, grant: control_pb2.LeaseGrant) -> None:
        lease = control.lease_from_proto(grant.lease)
        blob = self._blobs.pop((lease.job_id, lease.epoch), None)
        if self._draining:
            await self._fail(
                Refused(lease=lease, reason="DRAINING", message="the device takes no new leases")
            )
            return
        answer = await self._in_thread(lambda: self._worker.grant(grant, blob))
        if isinstance(answer, Refused):
            await self._fail(answer)
            return
        self._links.open(lease, grant.gradient_endpoint)
        link = self._links.of(lease)
        if link is not None:
            # A link lost just now is not the control stream's concern: the next one sends all weights.
            with suppress(Unavailable):
                await link.send_update(answer)

    async def _fail(self, refused: Refused) -> None:
        failed = control_pb2.LeaseFailed(
            lease=control.lease_to_proto(refused.lease), reason=refused.reason, message=refused.message
        )
        await self._stream.send_control(control_pb2.DeviceControl(lease_failed=failed))

    async def _send_heartbeats(self) -> None:
        busy_before = self._worker.busy_seconds
        while True:
            beat = control_pb2.Heartbeat(
                busy_seconds=self._worker.busy_seconds - busy_before,
                resident_bytes=self._worker.resident_bytes,
                free_bytes=psutil.virtual_memory().available,
            )
            await self._stream.send_control(control_pb2.DeviceControl(heartbeat=beat))
            await asyncio.sleep(self._welcome.heartbeat_seconds)

    async def _on_messages(self, link: GradientLink, messages: list[bytes]) -> None:
        consumed = await self._in_thread(lambda: self._worker.consume(link.decode(messages)))
        if consumed.credit_bytes:
            await link.send_credit(consumed.credit_bytes)
        for answer in consumed.answers:
            await self._answer(link, answer)

    async def _answer(self, link: GradientLink, answer: Answer) -> None:
        if isinstance(answer, Refused) and answer.reason == OUT_OF_MEMORY:
            await self._fail(answer)  # to the coordinator, which asks another device then
        elif isinstance(answer, Refused):
            await link.send_refusal(answer)
        elif isinstance(answer, Norms):
            await link.send_norms(answer)
        else:
            begin = time.monotonic()
            await link.send_update(answer)
            self._worker.spans.add(
                "to the base model",
                "update",
                begin=begin,
                end=time.monotonic(),
                job=answer.lease.job_id,
                version=answer.version,
            )
            if answer.checkpoint_due:
                await self._checkpoint(answer.lease)

    async def _checkpoint(self, lease: Lease) -> None:
        made = await self._in_thread(lambda: self._worker.checkpoint(lease))
        if isinstance(made, Refused):
            await self._fail(made)
        else:
            await self._checkpoints.put(made)

    async def _send_checkpoints(self) -> None:
        """In a task of its own: a coordinator that is slow to store must not hold up the gradients."""
        while True:
            made = await self._checkpoints.get()
            address = TensorAddress(
                job_id=made.lease.job_id,
                epoch=made.lease.epoch,
                version=made.version,
                kind=TensorKind.BLOB,
            )
            blob = WireTensor(dtype=DType.UINT8, shape=(len(made.data),), data=memoryview(made.data))
            await self._stream.send_tensor(address, blob)
            crash_points.reach("device.checkpoint_sent")
            await self._stream.send_control(control_pb2.DeviceControl(checkpoint_made=_checkpoint_made(made)))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _checkpoint_made(made: Checkpoint) -> control_pb2.CheckpointMade:
    return control_pb2.CheckpointMade(
        lease=control.lease_to_proto(made.lease),
        version=made.version,
        bytes=len(made.data),
        sha256=made.sha256,
    )
