"""Gathers the tensors of one version of one adapter; only a complete, well-shaped version counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from cola_runtime.adapter_spec import LeaseTerms
from cola_runtime.adapters.adapter import torch_dtype
from cola_runtime.adapters.shapes import weight_shapes
from cola_runtime.errors import Conflict, Fenced, ProtocolError
from cola_runtime.proto import control_pb2
from cola_runtime.transport.reader import ReceivedTensor
from cola_runtime.transport.tensors import from_wire
from cola_runtime.types import Lease, TensorKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """All weights of one version of an adapter, and what the device and the counters say about the step."""

    lease: Lease
    terms: LeaseTerms
    version: int
    weights: dict[TensorKey, Tensor]
    learning_rate: float
    gradient_norm: float
    device_seconds: float
    bytes_up: int
    bytes_down: int


@dataclass(slots=True)
class _Pending:
    version: int
    weights: dict[TensorKey, Tensor] = field(default_factory=dict)
    wire_bytes: int = 0
    failure: ProtocolError | None = None  # told at UpdateEnd, so that the device hears of it once


class LeasedAdapter:
    """What the base model knows of one lease: who may update, to which shapes, from which version."""

    def __init__(self, lease: Lease, terms: LeaseTerms) -> None:
        self.lease = lease
        self.terms = terms
        self.version: int | None = None  # of the last complete update
        self._shapes = weight_shapes(terms.spec)
        self._dtype = torch_dtype(terms.spec)
        self._pending: _Pending | None = None
        self._bytes_up: dict[int, int] = {}

    def count_up(self, version: int, wire_bytes: int) -> None:
        """Count bytes sent to the device for the step that leaves `version`."""
        self._bytes_up[version] = self._bytes_up.get(version, 0) + wire_bytes

    def add(self, received: ReceivedTensor) -> None:
        """Take one weight of a coming version; a fault is kept and told by `complete`."""
        address = received.address
        if self._pending is None or self._pending.version != address.version:
            self._pending = _Pending(address.version)
        pending = self._pending
        pending.wire_bytes += received.wire_bytes
        try:
            self._take(pending, TensorKey(address.site, address.kind, address.slot), from_wire(received))
        except ProtocolError as error:
            pending.failure = pending.failure or error

    def complete(self, end: control_pb2.UpdateEnd, *, wire_bytes: int) -> Update:
        """The whole update. Raises ProtocolError, or Conflict STEP_OUT_OF_ORDER for a version out of turn."""
        pending, self._pending = self._pending or _Pending(end.version), None
        self._check(pending, end)
        self.version = end.version
        bytes_up = self._bytes_up.pop(end.version - 1, 0)
        self._bytes_up = {
            version: count for version, count in self._bytes_up.items() if version >= end.version
        }
        return Update(
            lease=self.lease,
            terms=self.terms,
            version=end.version,
            weights=pending.weights,
            learning_rate=end.learning_rate,
            gradient_norm=end.gradient_norm,
            device_seconds=end.device_seconds,
            bytes_up=bytes_up,
            bytes_down=pending.wire_bytes + wire_bytes,
        )

    def _take(self, pending: _Pending, key: TensorKey, tensor: Tensor) -> None:
        shape = self._shapes.get(key)
        if shape is None or tuple(tensor.shape) != shape or tensor.dtype != self._dtype:
            raise ProtocolError(
                "UPDATE_INVALID",
                f"{key.kind.name} of site {key.site} is {tensor.dtype} {tuple(tensor.shape)}",
                limit=f"{self._dtype} {shape}",
            )
        if key in pending.weights:
            raise ProtocolError("UPDATE_INVALID", f"{key.kind.name} of site {key.site} came twice")
        pending.weights[key] = tensor

    def _check(self, pending: _Pending, end: control_pb2.UpdateEnd) -> None:
        if pending.failure is not None:
            raise pending.failure
        counts = (len(pending.weights), end.tensors)
        if pending.version != end.version or counts != (len(self._shapes), len(self._shapes)):
            raise ProtocolError(
                "UPDATE_INCOMPLETE",
                f"version {end.version} has {end.tensors} tensors, {counts[0]} of {pending.version} came",
                limit=len(self._shapes),
            )
        if self.version is not None and end.version not in (self.version, self.version + 1):
            raise Conflict(
                "STEP_OUT_OF_ORDER", "an update out of turn", limit=self.version + 1, actual=end.version
            )


class LeaseTable:
    """The leases that the base model honours. Rising epochs only."""

    def __init__(self) -> None:
        self._adapters: dict[str, LeasedAdapter] = {}

    def open(self, lease: Lease, terms: LeaseTerms) -> None:
        """Honour `lease` instead of any older one. Raises Fenced for an older epoch; again is no change."""
        current = self._adapters.get(lease.job_id)
        if current is not None and (current.lease, current.terms) == (lease, terms):
            return
        if current is not None and lease.epoch <= current.lease.epoch:
            raise Fenced("FENCED", "an older lease", limit=current.lease.epoch, actual=lease.epoch)
        self._adapters[lease.job_id] = LeasedAdapter(lease, terms)

    def end(self, job_id: str, epoch: int) -> bool:
        """Stop honouring the lease, unless a newer one has come; True if it was honoured."""
        current = self._adapters.get(job_id)
        if current is None or current.lease.epoch > epoch:
            return False
        del self._adapters[job_id]
        return True

    def find(self, lease: Lease) -> LeasedAdapter | None:
        """The adapter if exactly this lease is honoured."""
        current = self._adapters.get(lease.job_id)
        return current if current is not None and current.lease == lease else None

    def of(self, job_id: str, *, epoch: int, device_id: str) -> LeasedAdapter | None:
        return self.find(Lease(job_id=job_id, epoch=epoch, device_id=device_id))

    def refusal(self, lease: Lease) -> tuple[str, str]:
        """Reason and message for a lease that is not honoured."""
        current = self._adapters.get(lease.job_id)
        if current is None:
            return "LEASE_UNKNOWN", "the base model holds no lease of this job"
        return "FENCED", f"epoch {current.lease.epoch} on {current.lease.device_id} holds this job"
