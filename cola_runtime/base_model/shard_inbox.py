"""What one device sends of its shard of an adapter (of all of it, unless the adapter is sharded)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cola_runtime.adapter_spec import AdapterSpec
from cola_runtime.adapters.adapter import torch_dtype
from cola_runtime.adapters.flat_layout import FlatLayout
from cola_runtime.errors import Conflict, InvalidInput, ProtocolError
from cola_runtime.gradients.norms import tensor_norms
from cola_runtime.proto import control_pb2
from cola_runtime.transport.reader import ReceivedTensor
from cola_runtime.transport.tensors import from_wire
from cola_runtime.types import TensorKey, TensorKind

MAX_WEIGHT_NORM = 1e9  # of one tensor: beyond, its squares and products leave float32


@dataclass(slots=True)
class _Pending:
    version: int
    weights_P: Tensor | None = None
    wire_bytes: int = 0
    failure: ProtocolError | None = None  # told at UpdateEnd, so that the device hears of it once


class ShardInbox:
    """The version under way, the last complete one until it is handed over, the norms of the last step."""

    def __init__(self, spec: AdapterSpec) -> None:
        self.version: int | None = None  # of the last complete update
        self.end: control_pb2.UpdateEnd | None = None  # of the last complete update, until it is handed over
        self.normed_version: int | None = None  # that the step of `norms` leaves
        self.norms: dict[TensorKey, float] = {}
        self._layout = FlatLayout(spec)
        self._dtype = torch_dtype(spec)
        self._pending: _Pending | None = None
        self._complete_P: Tensor | None = None

    def add(self, received: ReceivedTensor) -> None:
        """Take all weights of a coming version; a fault is kept and told by `complete`."""
        address = received.address
        if self._pending is None or self._pending.version != address.version:
            self._pending = _Pending(address.version)
        pending = self._pending
        pending.wire_bytes += received.wire_bytes
        try:
            self._take(pending, address.kind, from_wire(received))
        except ProtocolError as error:
            pending.failure = pending.failure or error

    def complete(self, end: control_pb2.UpdateEnd) -> int:
        """The version is whole: keep it until it is handed over. Returns the bytes of its weights.

        Raises ProtocolError; Conflict STEP_OUT_OF_ORDER for a version out of turn; InvalidInput
        NON_FINITE_ADAPTER or UPDATE_TOO_LARGE for weights that no base step should see.
        """
        pending, self._pending = self._pending or _Pending(end.version), None
        self._check(pending, end)
        assert pending.weights_P is not None  # `_check` has looked
        self._check_sizes(pending.version, pending.weights_P)
        self.version, self.end, self._complete_P = end.version, end, pending.weights_P
        return pending.wire_bytes

    def hand_over(self) -> tuple[Tensor, dict[TensorKey, Tensor]]:
        """The weights [P] of the last complete version, and their views; nobody else's from now on."""
        assert self._complete_P is not None, "asked for only where `end` is there"
        weights_P, self._complete_P, self.end = self._complete_P, None, None
        return weights_P, self._layout.views(weights_P)

    def take_norms(self, message: control_pb2.ShardNorms) -> None:
        """Raises ProtocolError `NORMS_INVALID` for another version, or another number of them."""
        if message.version != self.version or len(message.norms) != len(self._layout.shapes):
            raise ProtocolError(
                "NORMS_INVALID",
                f"{len(message.norms)} norms of version {message.version}",
                limit=f"{len(self._layout.shapes)} of version {self.version}",
            )
        self.normed_version = message.version
        self.norms = dict(zip(self._layout.shapes, message.norms, strict=True))

    def _take(self, pending: _Pending, kind: TensorKind, weights_P: Tensor) -> None:
        expected = (self._layout.numel,)
        if kind is not TensorKind.WEIGHTS or weights_P.shape != expected or weights_P.dtype != self._dtype:
            raise ProtocolError(
                "UPDATE_INVALID",
                f"{kind.name} is {weights_P.dtype} {tuple(weights_P.shape)}",
                limit=f"{TensorKind.WEIGHTS.name} in {self._dtype} {expected}",
            )
        if pending.weights_P is not None:
            raise ProtocolError("UPDATE_INVALID", f"the weights of version {pending.version} came twice")
        pending.weights_P = weights_P

    def _check(self, pending: _Pending, end: control_pb2.UpdateEnd) -> None:
        if pending.failure is not None:
            raise pending.failure
        if pending.version != end.version or pending.weights_P is None:
            came = "no weights" if pending.weights_P is None else f"weights of version {pending.version}"
            raise ProtocolError("UPDATE_INCOMPLETE", f"version {end.version} is announced, {came} came")
        if self.version is not None and end.version not in (self.version, self.version + 1):
            raise Conflict(
                "STEP_OUT_OF_ORDER", "an update out of turn", limit=self.version + 1, actual=end.version
            )

    def _check_sizes(self, version: int, weights_P: Tensor) -> None:
        """Tensor by tensor only where all of them together are too large: none is larger than they are."""
        if float(torch.linalg.vector_norm(weights_P)) <= MAX_WEIGHT_NORM:
            return
        weights = self._layout.views(weights_P)
        norms = zip(weights, tensor_norms(weights.values()).tolist(), strict=True)
        key, norm = max(norms, key=lambda each: each[1] if each[1] == each[1] else math.inf)
        if norm <= MAX_WEIGHT_NORM:
            return
        finite = bool(weights_P.isfinite().all())
        raise InvalidInput(
            "UPDATE_TOO_LARGE" if finite else "NON_FINITE_ADAPTER",
            f"{key.kind.name} of site {key.site} at version {version} has the norm {norm:g}",
            limit=f"{MAX_WEIGHT_NORM:g}",
        )
