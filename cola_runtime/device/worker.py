"""The device's work on its adapters: plain and synchronous, called from one thread only.

Decides nothing about streams: it takes what arrived in order and returns what is to be sent.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cola_runtime import crash_points
from cola_runtime.adapters.checkpoint_format import TrainingDefinition
from cola_runtime.device.answers import Answer, Checkpoint, Consumed, Norms, Refused, Update
from cola_runtime.device.memory import shortage_named
from cola_runtime.device.sent_chain import SentChain
from cola_runtime.device.session import AdapterSession, Applied
from cola_runtime.errors import ColaError, Conflict, Fenced, ProtocolError
from cola_runtime.proto import control_pb2
from cola_runtime.trace.report import WORKER
from cola_runtime.trace.spans import SpanRecorder
from cola_runtime.transport import control
from cola_runtime.transport.frames import HEADER_BYTES, DType, TensorAddress, tensor_frames
from cola_runtime.transport.packs import ReceivedPack
from cola_runtime.transport.reader import ReceivedTensor
from cola_runtime.transport.stream import Item
from cola_runtime.transport.tensors import tap_from_wire, tensors_from_wire, to_wire, vector_from_wire
from cola_runtime.types import Lease, TensorKey, TensorKind

GradientItem = Item[control_pb2.GradientControl]


@dataclass(slots=True)
class _Held:
    """A lease's session. After a refusal it takes no more taps until the lease is granted again."""

    lease: Lease
    session: AdapterSession
    checkpoint_every: int
    sharded: bool  # steps at a GlobalNorm only
    chain: SentChain
    announced: int | None = None  # a shard's version whose step waits for it
    behind: list[GradientItem] = field(default_factory=list)  # what arrived meanwhile, of the step ahead
    tensors: int = 0  # of the microbatch under way
    microbatch: int = 0  # the one under way; a gap means that a whole microbatch was lost
    step_seconds: float = 0.0  # gradient work of the step under way
    refused: bool = False


class DeviceWorker:
    """Every adapter leased to this device. Not thread-safe: one thread calls all of it."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}
        self._hashing = ThreadPoolExecutor(1, "update-chain")  # beside the sending of what it hashes
        self.spans = SpanRecorder()  # switched and read from the event loop
        self.busy_seconds = 0.0
        self.resident_bytes = 0  # of all sessions; may be read from another thread

    @property
    def idle(self) -> bool:
        """No lease is held; may be read from another thread."""
        return not self._held

    def grant(self, grant: control_pb2.LeaseGrant, checkpoint: bytes | None) -> Update | Refused:
        """Create or restore the adapter; returns the weights of the version it starts at."""
        lease = control.lease_from_proto(grant.lease)
        try:
            self._check_newer(lease)
            with shortage_named("the adapter and its optimizer state"):
                session = _session(grant, checkpoint)
        except ColaError as error:
            return Refused(lease=lease, reason=error.reason, message=str(error))
        chain = SentChain(lease, self._hashing, link=grant.chain)
        held = _Held(lease, session, grant.checkpoint_every, grant.shards > 1, chain)
        self._held[lease.job_id] = held
        self._count_resident()
        crash_points.reach("device.granted")
        return _update(held)

    def end(self, lease: Lease) -> None:
        """Forget the adapter, unless a newer lease holds it."""
        held = self._held.get(lease.job_id)
        if held is not None and held.lease.epoch <= lease.epoch:
            del self._held[lease.job_id]
            self._count_resident()

    def end_all(self) -> None:
        self._held.clear()
        self._count_resident()

    def current(self, job_ids: Collection[str]) -> list[Update]:
        """These jobs' weights as they are, for a base model that may have missed the last update.

        Forgets the taps of steps under way: they came over a stream that is gone.
        """
        ours = [held for job_id, held in self._held.items() if job_id in job_ids]
        for held in ours:
            _discard(held, refused=False)
        return [_update(held) for held in ours]

    def checkpoint(self, lease: Lease) -> Checkpoint | Refused:
        held = self._of(lease)
        if held is None:
            return Refused(lease=lease, reason="LEASE_UNKNOWN", message="this device does not hold the lease")
        started = time.monotonic()
        data = held.session.checkpoint()
        digest = hashlib.sha256(data).hexdigest()
        self._spent("checkpoint", started, lease.job_id, held.session.version)
        crash_points.reach("device.checkpoint_made")
        return Checkpoint(lease=lease, version=held.session.version, data=data, sha256=digest)

    def consume(self, items: Iterable[GradientItem]) -> Consumed:
        """Add taps, apply steps. What belongs to a lease that is not held is dropped, its bytes credited."""
        started = time.monotonic()
        consumed = Consumed()
        for item in items:
            if isinstance(item, ReceivedTensor | ReceivedPack):
                consumed.credit_bytes += item.wire_bytes
            consumed.answers += self._take(item)
        self._spent("gradients", started)
        return consumed

    def _spent(self, name: str, started: float, job_id: str = "", version: int = 0) -> None:
        now = time.monotonic()
        self.busy_seconds += now - started
        self.spans.add(WORKER, name, begin=started, end=now, job=job_id, version=version)

    def _count_resident(self) -> None:
        self.resident_bytes = sum(held.session.resident_bytes for held in self._held.values())

    def _take(self, item: GradientItem) -> list[Answer]:
        """One arrival. Of a shard whose step waits for the others', the step ahead stays until then."""
        held = self._waiting(item)
        if held is not None:
            held.behind.append(item)
            return []
        if isinstance(item, ReceivedTensor | ReceivedPack):
            answer: Answer | None = self._add(item)
        elif item.message.HasField("global_norm"):
            return self._apply_shard(item.message.global_norm)
        else:
            answer = self._control(item.message)
        return [] if answer is None else [answer]

    def _waiting(self, item: GradientItem) -> _Held | None:
        """The shard that this belongs to, while its step waits for the other shards."""
        if isinstance(item, ReceivedTensor | ReceivedPack):
            held = self._of_epoch(item.address.job_id, item.address.epoch)
        elif item.message.HasField("microbatch_end"):
            held = self._of(control.lease_from_proto(item.message.microbatch_end.lease))
        else:
            held = None
        return held if held is not None and held.announced is not None else None

    def _add(self, item: ReceivedTensor | ReceivedPack) -> Refused | None:
        address = item.address
        held = self._of_epoch(address.job_id, address.epoch)
        if held is None or held.refused:
            return None
        started = time.perf_counter()
        held.tensors += len(item.contents.packed.keys) if isinstance(item, ReceivedPack) else 1
        try:
            with shortage_named("a step's taps"):
                _add_to(held.session, item)
        except ColaError as error:
            return _refuse(held, error)
        held.step_seconds += time.perf_counter() - started
        return None

    def _control(self, message: Any) -> Answer | None:
        kind = message.WhichOneof("message")
        if kind == "microbatch_end":
            return self._end_microbatch(message.microbatch_end)
        if kind == "refusal":
            lease = control.lease_from_proto(message.refusal.lease)
            held = self._of(lease)
            if held is not None:
                held.refused = True
            return None
        raise ProtocolError("CONTROL_INVALID", f"a base model does not send {kind}")

    def _end_microbatch(self, end: control_pb2.MicrobatchEnd) -> Answer | None:
        held = self._of(control.lease_from_proto(end.lease))
        if held is None or held.refused:
            return None
        try:
            if (held.microbatch, held.tensors) != (end.microbatch, end.tensors):
                raise ProtocolError(
                    "MICROBATCH_INCOMPLETE",
                    f"{held.tensors} tensors of microbatch {held.microbatch} arrived, the base model sent "
                    f"{end.tensors} of microbatch {end.microbatch}",
                )
            held.tensors, held.microbatch = 0, held.microbatch + 1
            if not end.apply:
                return None
            version = end.version + end.staleness
            return _announce(held, version) if held.sharded else self._apply(held, version)
        except ColaError as error:
            return _refuse(held, error)

    def _apply_shard(self, of_all: control_pb2.GlobalNorm) -> list[Answer]:
        """The step that was announced; then what came behind it."""
        held = self._of(control.lease_from_proto(of_all.lease))
        if held is None or held.refused:
            return []
        try:
            if held.announced != of_all.version:
                message = f"a norm of version {of_all.version}, whose step is not complete here"
                raise ProtocolError("NORM_UNEXPECTED", message, limit=held.announced, actual=of_all.version)
            answers: list[Answer] = [self._apply(held, of_all.version, norm=of_all.norm)]
        except ColaError as error:
            return [_refuse(held, error)]
        held.announced, behind, held.behind = None, held.behind, []
        for item in behind:
            answers += self._take(item)
        return answers

    def _apply(self, held: _Held, version: int, *, norm: float | None = None) -> Update:
        crash_points.reach("device.step_complete")
        started = time.monotonic()
        with shortage_named("an optimizer step"):
            applied = held.session.apply(version=version, norm=norm)
        crash_points.reach("device.step_applied")
        seconds = held.step_seconds + applied.seconds
        job_id, now = held.lease.job_id, time.monotonic()
        self.spans.add(WORKER, "optimizer step", begin=started, end=now, job=job_id, version=applied.version)
        held.step_seconds, held.microbatch = 0.0, 0
        total = held.session.definition.schedule.total_steps
        every = held.checkpoint_every
        due = applied.version == total or (every > 0 and applied.version % every == 0)
        return _update(held, applied=applied, seconds=seconds, checkpoint_due=due)

    def _of(self, lease: Lease) -> _Held | None:
        return self._of_epoch(lease.job_id, lease.epoch)

    def _of_epoch(self, job_id: str, epoch: int) -> _Held | None:
        held = self._held.get(job_id)
        return held if held is not None and held.lease.epoch == epoch else None

    def _check_newer(self, lease: Lease) -> None:
        held = self._held.get(lease.job_id)
        if held is not None and lease.epoch <= held.lease.epoch:
            raise Fenced("FENCED", "an older lease", limit=held.lease.epoch, actual=lease.epoch)


def _add_to(session: AdapterSession, item: ReceivedTensor | ReceivedPack) -> None:
    address = item.address
    if isinstance(item, ReceivedTensor):
        key = TensorKey(address.site, address.kind, address.slot)
        session.add(key, tap_from_wire(item, session.dtype), version=address.version)
    elif item.dtype is DType.INT8_BLOCKS:
        for key, tensor in tensors_from_wire(item, session.dtype):
            session.add(key, tensor, version=address.version)
    else:
        session.add_packed(item.contents.packed, vector_from_wire(item), version=address.version)


def _session(grant: control_pb2.LeaseGrant, checkpoint: bytes | None) -> AdapterSession:
    definition = TrainingDefinition(
        spec=control.spec_from_proto(grant.adapter),
        optimizer=control.optimizer_from_proto(grant.optimizer),
        schedule=control.schedule_from_proto(grant.schedule),
    )
    if len(checkpoint or b"") != grant.checkpoint_bytes:
        raise ProtocolError(
            "CHECKPOINT_MISSING",
            "the checkpoint did not come before its grant",
            limit=grant.checkpoint_bytes,
            actual=len(checkpoint or b""),
        )
    if not checkpoint:
        return AdapterSession.create(definition, max_staleness=grant.max_staleness)
    session = AdapterSession.restore(checkpoint, max_staleness=grant.max_staleness)
    if session.definition != definition:
        raise Conflict("CHECKPOINT_MISMATCH", "the checkpoint is of another adapter, optimizer or schedule")
    return session


def _update(
    held: _Held, *, applied: Applied | None = None, seconds: float = 0.0, checkpoint_due: bool = False
) -> Update:
    lease, session = held.lease, held.session
    address = TensorAddress(lease.job_id, lease.epoch, session.version, TensorKind.WEIGHTS)
    frames = tensor_frames(address, to_wire(session.weights_vector))
    copied = [b"".join(frame) for frame in frames]  # later steps do not change it
    if applied is not None:
        held.chain.extend(session.version, [memoryview(frame)[HEADER_BYTES:] for frame in copied])
    return Update(
        lease=lease,
        version=session.version,
        frames=tuple((frame,) for frame in copied),
        link=held.chain.link,
        learning_rate=applied.learning_rate if applied else 0.0,
        gradient_norm=applied.gradient_norm if applied else 0.0,
        seconds=seconds,
        checkpoint_due=checkpoint_due,
    )


def _announce(held: _Held, version: int) -> Norms:
    started = time.perf_counter()
    norms = held.session.gradient_norms().tolist()
    held.announced = version
    held.step_seconds += time.perf_counter() - started
    return Norms(lease=held.lease, version=version, norms=tuple(norms))


def _discard(held: _Held, *, refused: bool) -> None:
    held.session.discard()
    held.announced, held.behind = None, []
    held.tensors, held.microbatch, held.step_seconds, held.refused = 0, 0, 0.0, refused


def _refuse(held: _Held, error: ColaError) -> Refused:
    _discard(held, refused=True)
    return Refused(lease=held.lease, reason=error.reason, message=str(error))
