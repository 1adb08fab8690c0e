"""The devices that dialled in: who is there, what they say, who went silent.

A device is lost when its control stream ends or when it sends no heartbeat for the lease timeout. Its
leases are lost with it; what it still sends under them is fenced by their epoch.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cola_runtime.adapters.checkpoint_format import Encoded
from cola_runtime.config import DeviceSettings
from cola_runtime.errors import ColaError, ProtocolError, Unauthenticated, Unavailable
from cola_runtime.job_choices import TrustClass
from cola_runtime.jobs.audit import AuditEntry, AuditTrail
from cola_runtime.proto import control_pb2
from cola_runtime.scheduler.connected_device import UNABLE_REASONS, ConnectedDevice, check_speed
from cola_runtime.scheduler.device_choice import DeviceChoice
from cola_runtime.scheduler.device_gate import Admission, DeviceGate
from cola_runtime.scheduler.device_spans import Answered, DeviceSpans
from cola_runtime.scheduler.incoming_checkpoints import (
    CHECKPOINT_LIMITS,
    ArrivedCheckpoint,
    IncomingCheckpoints,
)
from cola_runtime.scheduler.leases import LeaseBook, LeaseLost
from cola_runtime.scheduler.ports import FaultListener, nobody_hears
from cola_runtime.transport.control import lease_from_proto, told_by_device
from cola_runtime.transport.handshake import receive_hello
from cola_runtime.transport.reader import ReceivedTensor
from cola_runtime.transport.stream import FrameStream, ReceivedControl
from cola_runtime.types import Lease

logger = logging.getLogger(__name__)

CheckpointSink = Callable[[Lease, int, Encoded, str], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStatus:
    device_id: str
    state: str  # "ready" or "draining"
    jobs: int
    busy_seconds: float
    trust_class: str
    pid: int


class DevicePool:
    """The coordinator's end of every control stream.

    `device` and `end` take the lease of one device; of a sharded adapter's lease, its part.
    """

    def __init__(
        self,
        settings: DeviceSettings,
        *,
        gate: DeviceGate,
        audit: AuditTrail,
        book: LeaseBook,
    ) -> None:
        self._settings = settings
        self._gate, self._audit = gate, audit
        self._book = book
        self._devices: dict[str, ConnectedDevice] = {}
        self._orders = itertools.count()
        self._joined = asyncio.Condition()
        self.choice = DeviceChoice(
            self._devices, joined=self._joined, book=book, rebalance_seconds=settings.rebalance_seconds
        )
        self.closing = False  # devices that leave from now on are not lost
        self._storing: set[asyncio.Task[None]] = set()
        self.on_checkpoint: CheckpointSink | None = None
        self.on_dismissed: Callable[[str], Awaitable[None]] | None = None  # its other streams end, too
        self.on_fault: FaultListener = nobody_hears
        self._spans = DeviceSpans()
        self._recording = False

    async def on_stream(self, stream: FrameStream[Any]) -> None:
        """Serve one device until its stream ends. Registered as `/cola.v1.Devices/Attach`."""
        hello, admission = await self._let_in(stream)
        device = ConnectedDevice(
            hello=hello, admission=admission, stream=stream, order=next(self._orders), heard=time.monotonic()
        )
        await self._admit(device)
        try:
            await self._welcome(device)
            await self._gate.admit(hello, stream.certificate)  # it may have been put out in between
            if self._recording:
                record = control_pb2.RecordSpans(on=True)
                await device.stream.send_control(control_pb2.DeviceControl(record_spans=record))
            await self._listen(device)
        except ProtocolError as error:
            self.on_fault(hello.device_id, error.reason)
            raise
        finally:
            self._forget(device, "its control stream ended")

    async def _let_in(self, stream: FrameStream[Any]) -> tuple[control_pb2.DeviceHello, Admission]:
        admitted: list[Admission] = []

        async def check(hello: control_pb2.DeviceHello) -> None:
            admitted.append(await self._gate.admit(hello, stream.certificate))
            check_speed(hello)

        try:
            hello = await receive_hello(stream, check=check, limits=CHECKPOINT_LIMITS)
        except Unauthenticated as error:
            host = stream.peer.rpartition(":")[0]  # each of its attempts has another port
            refusal = AuditEntry(kind="device.refused", actor=host, message=error.reason)
            await self._audit.add_bounded(refusal)
            raise
        return hello, admitted[0]

    async def wait_joined(self, count: int, *, timeout_seconds: float) -> None:
        """Return when `count` devices are there, or after the timeout with those that are."""
        try:
            async with asyncio.timeout(timeout_seconds), self._joined:
                await self._joined.wait_for(lambda: len(self._devices) >= count)
        except TimeoutError:
            message = "%d of %d devices joined within %g s"
            logger.warning(
                message, len(self._devices), count, timeout_seconds, extra={"event": "device.missing"}
            )

    def close(self) -> None:
        """The port is closed: whoever is still counted as there has left."""
        for device in list(self._devices.values()):
            self._forget(device, "the coordinator stopped")

    def trust(self, device_id: str) -> TrustClass | None:
        """None: it is not connected."""
        device = self._devices.get(device_id)
        return None if device is None else device.admission.trust

    def draining(self, device_id: str) -> bool:
        device = self._devices.get(device_id)
        return device is not None and device.draining

    def device(self, lease: Lease) -> ConnectedDevice:
        """The one that holds the lease. Raises Unavailable `DEVICE_LOST`."""
        device = self._devices.get(lease.device_id)
        if device is None:
            raise Unavailable("DEVICE_LOST", f"device {lease.device_id} has left")
        return device

    async def end(self, lease: Lease) -> None:
        """Tell the device to forget the adapter; a device that has left has forgotten it already."""
        self.choice.forget(lease.job_id)
        device = self._devices.get(lease.device_id)
        if device is not None:
            await device.end(lease)

    async def record_spans(self, on: bool) -> dict[str, Answered]:
        """Let every device record what it does from now on, or no more; what each answered."""
        self._recording = on
        devices = {name: device.stream.send_control for name, device in self._devices.items()}
        return await self._spans.ask(devices, on=on)

    async def watch_forever(self) -> None:
        """Lose every device that has been silent for the lease timeout, or whose certificate has ended."""
        while True:
            await asyncio.sleep(self._settings.heartbeat_seconds / 2)
            oldest = time.monotonic() - self._settings.lease_timeout_seconds
            for device in [d for d in self._devices.values() if d.heard < oldest]:
                self._forget(device, f"no heartbeat for {self._settings.lease_timeout_seconds:g} s")
                await device.stream.close()
            now = datetime.now(UTC)
            for device in [d for d in self._devices.values() if (d.admission.until or now) < now]:
                proof = "join token" if device.stream.certificate is None else "certificate"
                await self.dismiss(device.hello.device_id, f"its {proof} has expired")
            self.choice.rebalance()

    async def dismiss(self, device_id: str, why: str) -> None:
        """End the device's streams, if it is there; whether it may come back is the gate's to say."""
        device = self._devices.get(device_id)
        if device is not None:
            self._forget(device, why)
        if self.on_dismissed is not None:
            await self.on_dismissed(device_id)
        if device is not None:
            await device.stream.close()

    def statuses(self) -> list[DeviceStatus]:
        return [
            DeviceStatus(
                device_id=device_id,
                state="draining" if device.draining else "ready",
                jobs=len(self._book.on_device(device_id)),
                busy_seconds=device.busy_seconds,
                trust_class=device.admission.trust,
                pid=device.hello.pid,
            )
            for device_id, device in sorted(self._devices.items())
        ]

    async def _admit(self, device: ConnectedDevice) -> None:
        """A device that dials in again replaces its older self, whose leases are lost.

        If that is alive, since somebody else came with its hello, it is not heard until the place is free.
        """
        older = self._devices.get(device.hello.device_id)
        if older is not None:
            self._forget(older, "it dialled in again")
        async with self._joined:
            self._devices[device.hello.device_id] = device
            self._joined.notify_all()
        logger.info("device %s joined", device.hello.device_id, extra={"event": "device.joined"})
        self._note("device.joined", device, f"{device.admission.trust}, from {device.stream.peer}")

    async def _welcome(self, device: ConnectedDevice) -> None:
        welcome = control_pb2.DeviceWelcome(
            heartbeat_seconds=self._settings.heartbeat_seconds,
            gradient_ticket=self._gate.ticket(device.hello.device_id),
        )
        async with device.sending:
            await device.stream.send_control(control_pb2.DeviceControl(welcome=welcome))

    async def _listen(self, device: ConnectedDevice) -> None:
        incoming = IncomingCheckpoints(device.hello.device_id, self._book)
        async for item in device.stream:
            device.heard = time.monotonic()
            if device.hello.device_id not in self._devices:
                return  # who took its place has left: it dials in again
            if isinstance(item, ReceivedControl):
                await self._hear(device, item.message, incoming)
            elif isinstance(item, ReceivedTensor):
                incoming.keep(item)

    async def _hear(
        self,
        device: ConnectedDevice,
        message: control_pb2.DeviceControl,
        incoming: IncomingCheckpoints,
    ) -> None:
        kind = message.WhichOneof("message")
        if kind == "heartbeat":
            if device.beat(message.heartbeat):
                async with self._joined:  # a job may have waited for the memory
                    self._joined.notify_all()
        elif kind == "checkpoint_made":
            checkpoint = await incoming.take(message.checkpoint_made)
            if checkpoint is not None:
                task = asyncio.create_task(self._hand_on(checkpoint))
                self._storing.add(task)
                task.add_done_callback(self._storing.discard)
        elif kind == "lease_failed":
            self._lose(device, message.lease_failed)
        elif kind == "drain":
            device.draining = True
        elif kind == "recorded_spans":
            self._spans.heard(device.hello.device_id, message.recorded_spans)
        else:
            raise ProtocolError("CONTROL_UNEXPECTED", f"a device does not send {kind}")

    def _lose(self, device: ConnectedDevice, failed: control_pb2.LeaseFailed) -> None:
        """Of its own leases only: what a device says of another's, or of an older one, is ignored."""
        lease = lease_from_proto(failed.lease)
        if not self._book.holds(device.hello.device_id, lease):
            logger.info("failure of a lease that it does not hold ignored", extra={"event": "lease.not_held"})
            return
        reason, message = told_by_device(failed.reason, failed.message)
        if reason in UNABLE_REASONS:
            device.unable[lease.job_id] = f"{reason}: {message}"
        self._book.lose(lease, reason=reason, message=message)

    async def _hand_on(self, checkpoint: ArrivedCheckpoint) -> None:
        """Store a checkpoint beside the stream, so that heartbeats are heard meanwhile."""
        assert self.on_checkpoint is not None, "wired before the first device joins"
        lease = checkpoint.lease
        try:
            await self.on_checkpoint(lease, checkpoint.version, checkpoint.content, checkpoint.sha256)
        except (ColaError, LeaseLost) as error:
            logger.warning("checkpoint not kept: %s", error, extra={"event": "checkpoint.not_kept"})
            self.on_fault(lease.device_id, error.reason)

    def _forget(self, device: ConnectedDevice, why: str) -> None:
        device_id = device.hello.device_id
        if self._devices.get(device_id) is not device:
            return
        del self._devices[device_id]
        level = logging.INFO if self.closing else logging.WARNING
        logger.log(level, "device %s lost: %s", device_id, why, extra={"event": "device.lost"})
        self._note("device.left", device, why)
        self._book.lose_device(device_id, reason="DEVICE_LOST", message=f"device {device_id} was lost: {why}")

    def _note(self, kind: str, device: ConnectedDevice, message: str) -> None:
        """In the audit trail, beside whatever else goes on; a device that flaps is written down in part."""
        device_id = device.hello.device_id
        self._audit.note_bounded(AuditEntry(kind=kind, actor=device_id, subject=device_id, message=message))
