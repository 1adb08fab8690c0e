"""Serves the devices' gradient streams: taps out under credit, complete weight updates in.

A device that vanishes takes its outbox with it and touches nobody else. Everything runs on one event loop;
only `send_tap` may be called from the compute thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cola_runtime.adapter_spec import LeaseTerms
from cola_runtime.base_model.device_link import DeviceLink
from cola_runtime.base_model.retained import RetainedSteps
from cola_runtime.base_model.sent_taps import SentTaps
from cola_runtime.base_model.updates import LeasedAdapter, LeaseTable, Update
from cola_runtime.config import HostSettings
from cola_runtime.errors import ColaError, NotFound, ProtocolError, Unavailable
from cola_runtime.gradients.compression import Compressed
from cola_runtime.proto import control_pb2
from cola_runtime.trace.spans import SpanRecorder
from cola_runtime.transport import control
from cola_runtime.transport.concurrency import until_first_ends
from cola_runtime.transport.endpoints import GRADIENTS, serve_streams
from cola_runtime.transport.frames import TensorAddress
from cola_runtime.transport.handshake import check_ticket, receive_hello
from cola_runtime.transport.host_calls import HostCalls
from cola_runtime.transport.reader import FrameLimits, ReceivedTensor
from cola_runtime.transport.stream import FrameStream, ReceivedControl
from cola_runtime.transport.tensors import parcels
from cola_runtime.types import (
    BaseEvent,
    DeviceLinkChanged,
    Lease,
    Replay,
    Segment,
    StepRefused,
    TensorKey,
    TensorKind,
)

if TYPE_CHECKING:
    import grpc

REPLACE_SECONDS = 10.0
STOP_GRACE_SECONDS = 1.0


class GradientServer:
    """`on_update` gets every complete version, `on_event` links and refusals; both must return at once."""

    def __init__(
        self,
        *,
        join_token: str,
        on_update: Callable[[Update], None],
        on_event: Callable[[BaseEvent], None],
        spans: SpanRecorder | None = None,
        retained: RetainedSteps | None = None,
    ) -> None:
        self._spans = spans or SpanRecorder()
        self._join_token = join_token
        self._on_update = on_update
        self._on_event = on_event
        self._leases = LeaseTable()
        self._links: dict[str, DeviceLink] = {}
        self.retained = retained or RetainedSteps()
        self.norm_deviations: dict[str, float] = {}  # of replayed shards, the greatest, by the replay's job
        self._dismissed: dict[str, float] = {}  # when; a device of which the coordinator thinks better later
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: grpc.aio.Server | None = None

    async def start(
        self,
        bind: str,
        *,
        credentials: grpc.ServerCredentials | None = None,
        hosts: HostSettings | None = None,
    ) -> str:
        """Listen; returns host:port. A host's streams count as at the coordinator's ports, by themselves."""
        self._loop = asyncio.get_running_loop()
        self._server, endpoint = await serve_streams(
            bind,
            {GRADIENTS: self._serve_device},
            credentials=credentials,
            where="base_models.bind",
            interceptors=(HostCalls(hosts or HostSettings()),),
        )
        return endpoint

    async def stop(self) -> None:
        """End every stream and stop listening."""
        if self._server is not None:
            await self._server.stop(STOP_GRACE_SECONDS)

    def lease(self, lease: Lease, terms: LeaseTerms) -> None:
        """Honour this lease from now on. Raises Fenced for an older epoch."""
        self._leases.open(lease, terms)

    def end_lease(self, job_id: str, epoch: int) -> bool:
        return self._leases.end(job_id, epoch)

    def honours(self, lease: Lease) -> bool:
        """Exactly this lease is open."""
        return self._leases.find(lease) is not None

    def dismiss(self, device_id: str) -> None:
        """End the device's stream at once. A ticket from before this moment opens no other."""
        self._dismissed[device_id] = time.time()
        link = self._links.get(device_id)
        if link is not None:
            link.replace()

    def replay(self, lease: Lease, replay: Replay) -> None:
        """Send what was sent for the steps of another lease, as if they were this one's.

        Raises NotFound `STEPS_NOT_RETAINED`.
        """
        steps, link = self.retained.steps(replay), self._links.get(lease.device_id)
        if steps is None or link is None:
            raise NotFound("STEPS_NOT_RETAINED", f"steps {replay.first} to {replay.last} are not all kept")
        for sent in steps:
            if isinstance(sent, control_pb2.GradientControl):
                message = control_pb2.GradientControl()
                message.CopyFrom(sent)
                of_step = getattr(message, str(message.WhichOneof("message")))
                of_step.lease.CopyFrom(control.lease_to_proto(lease))
                link.put_control(message)
            else:
                address, parcel = sent
                link.put_parcel(address._replace(job_id=lease.job_id, epoch=lease.epoch), parcel)

    def send_tap(self, segment: Segment, tensors: Mapping[TensorKey, Compressed]) -> Counter[int]:
        """Queue taps for their sites' devices; returns site -> tensors. From any thread, never blocks.

        The tensors must not be changed afterwards. Without a link to the device they are dropped: the
        microbatch's end tells.
        """
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._queue_tap, segment, tensors)
        return Counter(key.site for key in tensors)

    def end_microbatch(self, segment: Segment, tensors: Mapping[int, int]) -> None:
        """All taps of the segment were sent, so many of each site. From any thread, in order with `send_tap`.

        Emits StepRefused DEVICE_UNREACHABLE without a device.
        """
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._queue_end, segment, tensors)

    def _queue_end(self, segment: Segment, tensors: Mapping[int, int]) -> None:
        counts = Counter({device_id: 0 for device_id in segment.lease.device_ids})
        for site, count in tensors.items():
            counts[self._device_of(segment, site)] += count
        for part in segment.lease.parts:
            end = control_pb2.MicrobatchEnd(
                lease=control.lease_to_proto(part),
                version=segment.version,
                microbatch=segment.microbatch,
                tensors=counts[part.device_id],
                apply=segment.last_microbatch,
                staleness=segment.staleness,
            )
            message = control_pb2.GradientControl(microbatch_end=end)
            if segment.retained and self.honours(segment.lease):
                self.retained.sent_control(part, segment.trained_version, message)
            self._put_control(part, message, trained_version=segment.trained_version)

    def _queue_tap(self, segment: Segment, tensors: Mapping[TensorKey, Compressed]) -> None:
        address = TensorAddress(
            job_id=segment.lease.job_id,
            epoch=segment.lease.epoch,
            version=segment.version,
            microbatch=segment.microbatch,
            kind=TensorKind.BLOB,  # a parcel says itself which tensors it holds
        )
        by_device: dict[str, dict[TensorKey, Compressed]] = {}
        for key, tensor in tensors.items():
            by_device.setdefault(self._device_of(segment, key.site), {})[key] = tensor
        for part in segment.lease.parts:
            link, of_device = self._links.get(part.device_id), by_device.get(part.device_id, {})
            if link is None:
                continue
            sent = 0
            for parcel in parcels(of_device):
                sent += link.put_parcel(address, parcel)
                if segment.retained and self.honours(segment.lease):
                    self.retained.sent_parcel(part, segment.trained_version, address, parcel)
            self._count_up(segment.lease, segment.trained_version, sent)

    def _device_of(self, segment: Segment, site: int) -> str:
        adapter = self._leases.find(segment.lease)
        return segment.lease.device_id if adapter is None else adapter.device_of(site)

    def _put_control(
        self, part: Lease, message: control_pb2.GradientControl, *, trained_version: int
    ) -> None:
        """To one device of a lease, counted as bytes of the step that leaves `trained_version`."""
        link = self._links.get(part.device_id)
        if link is None:
            text = f"device {part.device_id} has no gradient stream"
            self._on_event(StepRefused(lease=part, reason="DEVICE_UNREACHABLE", message=text))
        else:
            self._count_up(part, trained_version, link.put_control(message))

    def _count_up(self, lease: Lease, trained_version: int, wire_bytes: int) -> None:
        adapter = self._leases.find(lease)
        if adapter is not None:
            adapter.count_up(trained_version, wire_bytes)

    async def _serve_device(self, stream: FrameStream[Any]) -> None:
        async def check(hello: control_pb2.GradientHello) -> None:
            since = self._dismissed.get(hello.device_id, 0.0)
            check_ticket(self._join_token, hello, stream.certificate, since=since)

        hello = await receive_hello(stream, check=check, limits=FrameLimits())
        link = self._new_link(stream, hello)
        await self._replace(link)
        await stream.send_control(control_pb2.GradientControl(welcome=control_pb2.GradientWelcome()))
        self._emit_link(link, connected=True)
        fault = ""
        try:
            await until_first_ends(self._read(link), link.send_forever(), link.wait_replaced())
        except ProtocolError as error:
            fault = error.reason
            raise
        finally:
            if self._links.get(link.device_id) is link:
                del self._links[link.device_id]
            self._emit_link(link, connected=False, fault=fault)
            link.gone.set()

    def _new_link(self, stream: FrameStream[Any], hello: control_pb2.GradientHello) -> DeviceLink:
        def on_parked(parked: bool) -> None:
            self._on_event(DeviceLinkChanged(device_id=hello.device_id, connected=True, parked=parked))

        return DeviceLink(
            stream,
            device_id=hello.device_id,
            credit_bytes=hello.credit_bytes,
            on_parked=on_parked,
            sent=SentTaps(self._spans, hello.device_id),
        )

    async def _replace(self, link: DeviceLink) -> None:
        """Take the device's place; a link that it left behind ends first, so that events stay in order."""
        previous = self._links.get(link.device_id)
        if previous is not None:
            previous.replace()
            try:
                async with asyncio.timeout(REPLACE_SECONDS):
                    await previous.gone.wait()
            except TimeoutError as error:
                raise Unavailable("DEVICE_ID_BUSY", f"{link.device_id} is still attached") from error
        self._links[link.device_id] = link

    def _emit_link(self, link: DeviceLink, *, connected: bool, fault: str = "") -> None:
        self._on_event(
            DeviceLinkChanged(
                device_id=link.device_id,
                connected=connected,
                parked=connected and link.parked,
                fault=fault,
            )
        )

    async def _read(self, link: DeviceLink) -> None:
        async for item in link.stream:
            if isinstance(item, ReceivedControl):
                self._control(link, item)
            elif isinstance(item, ReceivedTensor):
                address = item.address
                adapter = self._leases.of(address.job_id, epoch=address.epoch, device_id=link.device_id)
                if adapter is not None:
                    adapter.add(item, device_id=link.device_id)

    def _control(self, link: DeviceLink, item: ReceivedControl[control_pb2.GradientControl]) -> None:
        message = item.message
        kind = message.WhichOneof("message")
        if kind == "credit":
            link.return_credit(message.credit.bytes)
        elif kind == "update_end":
            self._end_update(link, message.update_end, item.wire_bytes)
        elif kind == "shard_norms":
            self._take_norms(link, message.shard_norms, item.wire_bytes)
        elif kind == "refusal":
            self._refused_by_device(link, message.refusal)
        else:
            raise ProtocolError("CONTROL_INVALID", f"a device does not send {kind}")

    def _end_update(self, link: DeviceLink, end: control_pb2.UpdateEnd, wire_bytes: int) -> None:
        def complete(adapter: LeasedAdapter) -> None:
            update = adapter.complete(end, device_id=link.device_id, wire_bytes=wire_bytes)
            if update is not None:
                self._on_update(update)

        self._act(link, control.lease_from_proto(end.lease), complete)

    def _take_norms(self, link: DeviceLink, norms: control_pb2.ShardNorms, wire_bytes: int) -> None:
        part = control.lease_from_proto(norms.lease)

        def take(adapter: LeasedAdapter) -> None:
            norm = adapter.add_norms(norms, device_id=link.device_id, wire_bytes=wire_bytes)
            if adapter.terms.replay is not None:  # the norm of all shards is sent as it was
                found = self.retained.norms_distance(adapter.terms.replay, norms.version, norms.norms)
                self.norm_deviations[part.job_id] = max(self.norm_deviations.get(part.job_id, 0.0), found)
                return
            self.retained.received_norms(part, norms.version, norms.norms)
            if norm is not None:
                self._let_step(adapter.lease, norms.version, norm)

        self._act(link, part, take)

    def _let_step(self, lease: Lease, version: int, norm: float) -> None:
        for part in lease.parts:
            of_all = control_pb2.GlobalNorm(lease=control.lease_to_proto(part), version=version, norm=norm)
            message = control_pb2.GradientControl(global_norm=of_all)
            self.retained.sent_control(part, version, message)
            self._put_control(part, message, trained_version=version)

    def _act(self, link: DeviceLink, lease: Lease, act: Callable[[LeasedAdapter], None]) -> None:
        """Do it for the device's adapter; what goes wrong the device hears, and who reads the events."""
        adapter = self._of_device(link, lease)
        if adapter is None:
            reason, message = self._leases.refusal(lease)
            link.put_control(_refusal(lease, reason, message))
            return
        try:
            act(adapter)
        except ColaError as error:
            link.put_control(_refusal(lease, error.reason, str(error)))
            self._on_event(StepRefused(lease=lease, reason=error.reason, message=str(error)))

    def _refused_by_device(self, link: DeviceLink, refusal: control_pb2.Refusal) -> None:
        lease = control.lease_from_proto(refusal.lease)
        if self._of_device(link, lease) is not None:
            reason, message = control.told_by_device(refusal.reason, refusal.message)
            self._on_event(StepRefused(lease=lease, reason=reason, message=message))

    def _of_device(self, link: DeviceLink, lease: Lease) -> LeasedAdapter | None:
        return self._leases.find(lease) if lease.device_id == link.device_id else None


def _refusal(lease: Lease, reason: str, message: str) -> control_pb2.GradientControl:
    refusal = control_pb2.Refusal(lease=control.lease_to_proto(lease), reason=reason, message=message)
    return control_pb2.GradientControl(refusal=refusal)
