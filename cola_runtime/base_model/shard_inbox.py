"""What one device sends of its shard of an adapter (of all of it, unless the adapter is sharded)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from cola_runtime.adapter_spec import AdapterSpec
from cola_runtime.adapters.adapter import torch_dtype
from cola_runtime.adapters.shapes import weight_shapes
from cola_runtime.errors import Conflict, InvalidInput, ProtocolError
from cola_runtime.gradients.norms import tensor_norms
from cola_runtime.proto import control_pb2
from cola_runtime.transport.reader import ReceivedTensor
from cola_runtime.transport.tensors import from_wire
from cola_runtime.types import TensorKey

MAX_WEIGHT_NORM = 1e9  # of one tensor: beyond, its squares and products leave float32


@dataclass(slots=True)
class _Pending:
    version: int
    weights: dict[TensorKey, Tensor] = field(default_factory=dict)
    wire_bytes: int = 0
    failure: ProtocolError | None = None  # told at UpdateEnd, so that the device hears of it once


class ShardInbox:
    """The version under way, the last complete one until it is handed over, the norms of the last step."""

    def __init__(self, spec: AdapterSpec) -> None:
        self.version: int | None = None  # of the last complete update
        self.end: control_pb2.UpdateEnd | None = None  # of the last complete update, until it is handed over
        self.normed_version: int | None = None  # that the step of `norms` leaves
        self.norms: dict[TensorKey, float] = {}
        self._shapes = weight_shapes(spec)
        self._dtype = torch_dtype(spec)
        self._pending: _Pending | None = None
        self._complete: dict[TensorKey, Tensor] = {}

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

    def complete(self, end: control_pb2.UpdateEnd) -> int:
        """The version is whole: keep it until it is handed over. Returns the bytes of its weights.

        Raises ProtocolError; Conflict STEP_OUT_OF_ORDER for a version out of turn; InvalidInput
        NON_FINITE_ADAPTER or UPDATE_TOO_LARGE for weights that no base step should see.
        """
        pending, self._pending = self._pending or _Pending(end.version), None
        self._check(pending, end)
        _check_sizes(pending)
        self.version, self.end, self._complete = end.version, end, pending.weights
        return pending.wire_bytes

    def hand_over(self) -> dict[TensorKey, Tensor]:
        """The weights of the last complete version, which are nobody else's from now on."""
        weights, self._complete, self.end = self._complete, {}, None
        return weights

    def take_norms(self, message: control_pb2.ShardNorms) -> None:
        """Raises ProtocolError `NORMS_INVALID` for another version, or another number of them."""
        if message.version != self.version or len(message.norms) != len(self._shapes):
            raise ProtocolError(
                "NORMS_INVALID",
                f"{len(message.norms)} norms of version {message.version}",
                limit=f"{len(self._shapes)} of version {self.version}",
            )
        self.normed_version = message.version
        self.norms = dict(zip(self._shapes, message.norms, strict=True))

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


def _check_sizes(pending: _Pending) -> None:
    norms = zip(pending.weights, tensor_norms(pending.weights.values()).tolist(), strict=True)
    key, norm = max(norms, key=lambda each: each[1] if each[1] == each[1] else math.inf)
    if norm <= MAX_WEIGHT_NORM:
        return
    finite = all(bool(weight.isfinite().all()) for weight in pending.weights.values())
    raise InvalidInput(
        "UPDATE_TOO_LARGE" if finite else "NON_FINITE_ADAPTER",
        f"{key.kind.name} of site {key.site} at version {pending.version} has the norm {norm:g}",
        limit=f"{MAX_WEIGHT_NORM:g}",
    )
