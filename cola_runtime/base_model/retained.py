"""What was sent to a device for steps that may be checked, and what came back: to be replayed elsewhere."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from cola_runtime.proto import control_pb2
from cola_runtime.transport.frames import TensorAddress
from cola_runtime.transport.tensors import Parcel
from cola_runtime.types import Lease, Replay, Segment

MOST_RETAINED_BYTES = 1 << 30
"""Of all leases together. A lease whose steps would go beyond keeps none, and is not checked."""

Sent = tuple[TensorAddress, Parcel] | control_pb2.MicrobatchEnd


@dataclass(slots=True)
class _Kept:
    sent: dict[int, list[Sent]] = field(default_factory=lambda: defaultdict(list))  # by the version trained
    weights: dict[int, Tensor] = field(default_factory=dict)  # [P] by version, of versions that they led to
    nbytes: int = 0
    overflowed: bool = False


class RetainedSteps:
    """By lease. Tensors are kept as they are, and nobody changes them. Belongs to the event loop."""

    def __init__(self, *, most_bytes: int = MOST_RETAINED_BYTES) -> None:
        self._most_bytes = most_bytes
        self._kept: dict[tuple[str, int], _Kept] = {}

    def sent_parcel(self, segment: Segment, address: TensorAddress, parcel: Parcel) -> None:
        self._sent(segment, (address, parcel), parcel.wire_bytes)

    def sent_end(self, segment: Segment, end: control_pb2.MicrobatchEnd) -> None:
        self._sent(segment, end, 0)

    def received(self, lease: Lease, version: int, weights_P: Tensor) -> None:
        """Kept only if what was sent for that step is."""
        kept = self._kept.get((lease.job_id, lease.epoch))
        if kept is not None and version - 1 in kept.sent and self._fits(kept, weights_P.nbytes):
            kept.weights[version] = weights_P

    def steps(self, replay: Replay) -> Iterator[Sent] | None:
        """Everything that was sent for the steps from `first` to `last`, in order; None: not all is kept."""
        kept = self._kept.get((replay.lease.job_id, replay.lease.epoch))
        versions = range(replay.first, replay.last)
        if kept is None or any(v not in kept.sent or v + 1 not in kept.weights for v in versions):
            return None
        return (each for version in versions for each in kept.sent[version])

    def weights(self, lease: Lease, version: int) -> Tensor | None:
        """[P]: what the lease's device sent as `version`."""
        kept = self._kept.get((lease.job_id, lease.epoch))
        return None if kept is None else kept.weights.get(version)

    def forget(self, job_id: str, epoch: int, *, before: int) -> None:
        """Steps of the lease that lead to versions up to `before` are not asked for any more."""
        kept = self._kept.get((job_id, epoch))
        if kept is None:
            return
        for version in [v for v in kept.sent if v < before]:
            gone = kept.sent.pop(version)
            kept.nbytes -= sum(each[1].wire_bytes for each in gone if isinstance(each, tuple))
        for version in [v for v in kept.weights if v <= before]:
            kept.nbytes -= kept.weights.pop(version).nbytes
        if not kept.sent and not kept.weights:
            del self._kept[job_id, epoch]

    def _sent(self, segment: Segment, sent: Sent, nbytes: int) -> None:
        key = segment.lease.job_id, segment.lease.epoch
        kept = self._kept.setdefault(key, _Kept())
        if self._fits(kept, nbytes):
            kept.sent[segment.trained_version].append(sent)

    def _fits(self, kept: _Kept, nbytes: int) -> bool:
        """Counts them; beyond the bound the lease keeps nothing, until all of it is forgotten."""
        if sum(each.nbytes for each in self._kept.values()) + nbytes > self._most_bytes:
            kept.sent.clear()
            kept.weights.clear()
            kept.nbytes, kept.overflowed = 0, True
        kept.nbytes += 0 if kept.overflowed else nbytes
        return not kept.overflowed
