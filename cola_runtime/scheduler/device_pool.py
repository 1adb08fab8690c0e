"""The devices that dialled in: who is there, who holds which lease, who went silent.

A device is lost when its control stream ends or when it sends no heartbeat for the lease timeout. Its
leases are lost with it; what it still sends under them is fenced by their epoch.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cola_runtime.config import DeviceSettings
from cola_runtime.errors import ColaError, ProtocolError, Unauthenticated, Unavailable
from cola_runtime.jobs.audit import AuditEntry, AuditTrail
from cola_runtime.jobs.plan import TrainingPlan
from cola_runtime.proto import control_pb2
from cola_runtime.scheduler.connected_device import ConnectedDevice, check_speed
from cola_runtime.scheduler.device_gate import Admission, DeviceGate
from cola_runtime.scheduler.device_spans import Answered, DeviceSpans
from cola_runtime.scheduler.leases import LeaseBook, LeaseLost
from cola_runtime.scheduler.placement import Demand, Offer, place, rebalance
from cola_runtime.scheduler.ports import FaultListener, nobody_hears
from cola_runtime.transport.control import (
    lease_from_proto,
    lease_grant,
    lease_to_proto,
    told_by_device,
)
from cola_runtime.transport.frames import DType, TensorAddress, WireTensor
from cola_runtime.transport.handshake import receive_hello
from cola_runtime.transport.reader import FrameLimits, ReceivedTensor
from cola_runtime.transport.stream import FrameStream, ReceivedControl
from cola_runtime.types import Lease, TensorKind, TrustClass

logger = logging.getLogger(__name__)

CHECKPOINT_LIMITS = FrameLimits(max_tensor_bytes=4 << 30, max_open_tensors=2, max_open_bytes=4 << 30)

UNABLE_REASONS = (
    "ADAPTER_MODULE_UNKNOWN", "ADAPTER_MODULE_INVALID", "ADAPTER_INVALID", "DEVICE_OUT_OF_MEMORY"
)  # fmt: skip
"""A device that refuses a lease so will refuse it again, as long as its process is what it is."""

CheckpointSink = Callable[[Lease, int, bytes, str], Awaitable[None]]


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

    `grant`, `end` and `request_checkpoint` speak to one device; of a sharded adapter's lease, about its part.
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
        self._demands: dict[str, Demand] = {}  # of jobs that were placed
        self._moved = time.monotonic()  # when a job was last asked to move
        self._joined = asyncio.Condition()
        self.placing = asyncio.Lock()  # one job at a time, so that each sees the load of those before it
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

    async def wait_able(self, job_id: str, demand: Demand, count: int) -> None:
        """Return when so many devices are connected that may and can train the job, as far as is known."""
        self._demands[job_id] = demand
        try:
            async with self._joined:
                await self._joined.wait_for(lambda: len(self.pick(job_id, demand, count)) >= count)
        except asyncio.CancelledError:
            self._demands.pop(job_id, None)
            raise

    def pick(self, job_id: str, demand: Demand, count: int) -> list[str]:
        """The able devices that would be through first (`placement.place`); none if there are too few."""
        return place(job_id, demand, self._offers(job_id), count)

    def trust(self, device_id: str) -> TrustClass | None:
        """None: it is not connected."""
        device = self._devices.get(device_id)
        return None if device is None else device.admission.trust

    def trusted_beside(self, device_id: str) -> str | None:
        """The trusted device with the fewest leases, other than this one; None: there is none."""
        able = [
            name
            for name, device in self._devices.items()
            if name != device_id and device.admission.trust is TrustClass.TRUSTED and not device.draining
        ]
        return min(able, key=lambda name: (len(self._book.on_device(name)), name), default=None)

    async def wait_trusted_beside(self, device_id: str) -> str:
        """As `trusted_beside`, as soon as there is one."""
        async with self._joined:
            await self._joined.wait_for(lambda: self.trusted_beside(device_id) is not None)
            found = self.trusted_beside(device_id)
        assert found is not None, "nothing ran in between"
        return found

    def draining(self, device_id: str) -> bool:
        device = self._devices.get(device_id)
        return device is not None and device.draining

    def unable(self, job_id: str) -> str:
        """Which of the connected devices cannot or may not train the job, and why; "" if each may."""
        if not self._devices:
            return "no device is connected"
        refusals = {device_id: device.unable.get(job_id) for device_id, device in self._devices.items()}
        demand = self._demands.get(job_id)
        if demand is not None:
            refusals |= {offer.device_id: offer.refusal(demand) for offer in self._offers(job_id)}
        found = "; ".join(f"{device_id} cannot train it: {why}" for device_id, why in refusals.items() if why)
        draining = all(device.draining for device in self._devices.values())
        return found or ("all devices are draining" if draining else "")

    async def grant(
        self,
        lease: Lease,
        plan: TrainingPlan,
        *,
        checkpoint: bytes | None,
        gradient_endpoint: str,
        chain: bytes = b"",
    ) -> None:
        """Tell the device to train the plan's adapter, or its shard, from its seed or from a checkpoint.

        Its taps come from `gradient_endpoint`. `chain` is the checkpoint's recorded link.
        """
        device = self._device(lease)
        message = lease_grant(
            lease,
            plan.adapter,
            optimizer=plan.optimizer,
            schedule=plan.schedule,
            checkpoint_bytes=len(checkpoint or b""),
            checkpoint_every=plan.checkpoint_every,
            gradient_endpoint=gradient_endpoint,
            max_staleness=plan.max_staleness,
            shards=plan.shards,
            chain=chain,
        )
        async with device.sending:
            if checkpoint is not None:
                address = TensorAddress(
                    job_id=lease.job_id, epoch=lease.epoch, version=0, kind=TensorKind.BLOB
                )
                content = WireTensor(dtype=DType.UINT8, shape=(len(checkpoint),), data=memoryview(checkpoint))
                await device.stream.send_tensor(address, content)
            await device.stream.send_control(message)

    async def end(self, lease: Lease) -> None:
        """Tell the device to forget the adapter; a device that has left has forgotten it already."""
        self._demands.pop(lease.job_id, None)
        device = self._devices.get(lease.device_id)
        if device is not None:
            ending = control_pb2.LeaseEnd(lease=lease_to_proto(lease))
            await device.stream.send_control(control_pb2.DeviceControl(lease_end=ending))

    async def request_checkpoint(self, lease: Lease) -> None:
        request = control_pb2.CheckpointRequest(lease=lease_to_proto(lease))
        await self._device(lease).stream.send_control(control_pb2.DeviceControl(checkpoint_request=request))

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
            self._rebalance()

    async def dismiss(self, device_id: str, why: str) -> None:
        """End the device's streams, if it is there; whether it may come back is the gate's to say."""
        device = self._devices.get(device_id)
        if device is not None:
            self._forget(device, why)
        if self.on_dismissed is not None:
            await self.on_dismissed(device_id)
        if device is not None:
            await device.stream.close()

    def _rebalance(self) -> None:
        """Ask one job to move, if that is worth it and the last move is long enough ago."""
        if time.monotonic() - self._moved < self._settings.rebalance_seconds:
            return
        leases = [lease for device_id in self._devices for lease in self._book.on_device(device_id)]
        movable = frozenset(lease.job_id for lease in leases if not lease.further_device_ids)
        move = rebalance(self._offers(""), movable)
        lease = None if move is None else self._book.current(move.job_id)
        if move is None or lease is None or move.job_id in self._devices[move.target].unable:
            return
        self._moved = time.monotonic()
        self._book.ask_move(lease, f"from device {move.source}, which has more to do, towards {move.target}")

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

    def _offers(self, job_id: str) -> list[Offer]:
        """Of the devices that take new leases and have not refused this job for good."""
        return [
            device.offer([lease.job_id for lease in self._book.on_device(device_id)], self._demands)
            for device_id, device in self._devices.items()
            if not device.draining and job_id not in device.unable
        ]

    def _device(self, lease: Lease) -> ConnectedDevice:
        device = self._devices.get(lease.device_id)
        if device is None:
            raise Unavailable("DEVICE_LOST", f"device {lease.device_id} has left")
        return device

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
        blobs: dict[tuple[str, int], ReceivedTensor] = {}
        async for item in device.stream:
            device.heard = time.monotonic()
            if device.hello.device_id not in self._devices:
                return  # who took its place has left: it dials in again
            if isinstance(item, ReceivedControl):
                await self._hear(device, item.message, blobs)
            elif isinstance(item, ReceivedTensor):
                if item.address.kind is not TensorKind.BLOB:
                    raise ProtocolError(
                        "TENSOR_INVALID", f"a control stream carries no {item.address.kind.name}"
                    )
                address = item.address
                part = Lease(job_id=address.job_id, epoch=address.epoch, device_id=device.hello.device_id)
                if self._holds(device, part):  # no other is kept, so that a device fills no memory with them
                    blobs[address.job_id, address.epoch] = item

    async def _hear(
        self,
        device: ConnectedDevice,
        message: control_pb2.DeviceControl,
        blobs: dict[tuple[str, int], ReceivedTensor],
    ) -> None:
        kind = message.WhichOneof("message")
        if kind == "heartbeat":
            if device.beat(message.heartbeat):
                async with self._joined:  # a job may have waited for the memory
                    self._joined.notify_all()
        elif kind == "checkpoint_made":
            made = message.checkpoint_made
            blob = blobs.pop((made.lease.job_id, made.lease.epoch), None)
            await self._take_checkpoint(device, made, blob)
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
        if not self._holds(device, lease):
            logger.info("failure of a lease that it does not hold ignored", extra={"event": "lease.not_held"})
            return
        reason, message = told_by_device(failed.reason, failed.message)
        if reason in UNABLE_REASONS:
            device.unable[lease.job_id] = f"{reason}: {message}"
        self._book.lose(lease, reason=reason, message=message)

    def _holds(self, device: ConnectedDevice, lease: Lease) -> bool:
        current = self._book.current(lease.job_id)
        return current is not None and current.covers(lease) and lease.device_id == device.hello.device_id

    async def _take_checkpoint(
        self, device: ConnectedDevice, made: control_pb2.CheckpointMade, blob: ReceivedTensor | None
    ) -> None:
        """Store a whole checkpoint of a current lease; one under an older epoch is ignored."""
        lease = lease_from_proto(made.lease)
        if not self._holds(device, lease):
            logger.info("checkpoint of an older lease ignored", extra={"event": "checkpoint.fenced"})
            return
        if blob is None or len(blob.data) != made.bytes:
            raise ProtocolError(
                "CHECKPOINT_INCOMPLETE",
                "a checkpoint's bytes must come before its message",
                limit=made.bytes,
                actual=len(blob.data) if blob else 0,
            )
        content = bytes(blob.data)
        digest = await asyncio.to_thread(lambda: hashlib.sha256(content).hexdigest())
        if digest != made.sha256:
            raise ProtocolError("CHECKPOINT_CORRUPT", "a checkpoint's sha256 does not match its bytes")
        task = asyncio.create_task(self._hand_on(lease, made.version, content, digest))
        self._storing.add(task)
        task.add_done_callback(self._storing.discard)

    async def _hand_on(self, lease: Lease, version: int, content: bytes, digest: str) -> None:
        """Store a checkpoint beside the stream, so that heartbeats are heard meanwhile."""
        assert self.on_checkpoint is not None, "wired before the first device joins"
        try:
            await self.on_checkpoint(lease, version, content, digest)
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
        entry = AuditEntry(kind=kind, actor=device_id, subject=device_id, message=message)
        task = asyncio.create_task(self._audit.add_bounded(entry))
        self._storing.add(task)
        task.add_done_callback(self._storing.discard)
