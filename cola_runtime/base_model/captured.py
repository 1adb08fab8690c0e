"""A pass over a CUDA device as two graphs: what was asked of it once is asked again by two calls.

Asking for the thousands of operations of a pass one by one takes the compute thread longer than a small pass
takes the device. Passes of equal structure ask for the same operations over the same buffers: these are
captured when a structure comes for the second time, and only what fills the buffers changes.
Shapes: B rows, T tokens, N = B T, D hidden.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from cola_runtime.adapter_spec import ModuleKind, input_dropout
from cola_runtime.base_model.body import Body
from cola_runtime.base_model.segments import Cohort, Member, MixedBatch
from cola_runtime.base_model.stacks.cohorts import Stacks, gathered_flats, part_scalings, recipients_of
from cola_runtime.base_model.tap_carrier import CopyingCarrier, Delivery, HandOut, Recipients, TapOutlet
from cola_runtime.base_model.workspace import Workspace
from cola_runtime.gradients.taps import Tap, TapSink

T = TypeVar("T")

MOST_CAPTURED = 32  # the least recently used is forgotten
MOST_SEEN = 1024  # structures and families that are remembered
PARCEL_BYTES = 4 << 20  # taps that are copied together: enough to fill the link, and early on their way
MOST_FAILURES = 2  # to capture one structure
_ALIGNMENT = 16

logger = logging.getLogger(__name__)


class CapturedPasses:
    """The captured passes of one body. Owned by the compute thread."""

    def __init__(self, body: Body, space: Workspace, carrier: CopyingCarrier) -> None:
        self._body, self._space, self._carrier = body, space, carrier
        self._stream = torch.cuda.Stream(space.device)  # type: ignore[no-untyped-call]
        self._pool: Any = None
        self._captured: OrderedDict[object, _Graphs] = OrderedDict()
        self._seen: OrderedDict[object, int] = OrderedDict()  # failures of structures, 0 of families
        self._generation = space.generation

    def find(
        self, batch: MixedBatch, outlet: TapOutlet | None, stacks: Callable[[TapOutlet], Stacks]
    ) -> CapturedBody | None:
        """The batch's pass, if one of its family came before; None: compute it as ever.

        The first of a family loads kernels, which may not be part of a captured pass.
        """
        if outlet is None or not all(_capturable(cohort.members[0]) for cohort in batch.cohorts):
            return None
        self._forget_moved()
        key = _structure(batch)
        if key not in self._captured:
            if self._failures(_family(batch)) is None or (self._failures(key) or 0) >= MOST_FAILURES:
                return None
            graphs = self._captured_now(batch, stacks)
            if graphs is None:
                self._seen[key] += 1
                return None
            self._captured[key] = graphs
        self._captured.move_to_end(key)
        while len(self._captured) > MOST_CAPTURED:
            self._captured.popitem(last=False)
        return CapturedBody(self._captured[key], self._space, self._carrier, outlet.sink)

    def forget(self) -> None:
        """Give back the memory of all captured passes."""
        torch.cuda.synchronize(self._space.device)
        self._captured.clear()

    def _forget_moved(self) -> None:
        """A captured pass reads and writes buffers where they were."""
        if self._generation != self._space.generation:
            self._captured.clear()
            self._generation = self._space.generation

    def _failures(self, key: object) -> int | None:
        """How often it could not be captured; None when it has come for the first time."""
        before = self._seen.setdefault(key, -1)
        self._seen[key] = max(before, 0)
        self._seen.move_to_end(key)
        while len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)
        return None if before < 0 else before

    def _captured_now(self, batch: MixedBatch, stacks: Callable[[TapOutlet], Stacks]) -> _Graphs | None:
        """A pass larger than all before makes its buffers grow, and is captured once more where they are."""
        for _ in range(2):
            graphs = self._capture(batch, stacks)
            if graphs is None or self._generation == self._space.generation:
                return graphs
            self._forget_moved()
        return None

    def _capture(self, batch: MixedBatch, stacks: Callable[[TapOutlet], Stacks]) -> _Graphs | None:
        """None where it cannot be captured."""
        graphs = _Graphs(batch, self._space.device)
        if not self._captured:  # with its last graph a pool is gone, and none can be captured in it
            self._pool = torch.cuda.graph_pool_handle()
        compute = torch.cuda.current_stream(self._space.device)
        self._stream.wait_stream(compute)
        try:
            with torch.cuda.stream(self._stream):
                graphs.capture(self._body, stacks, self._pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            logger.warning(
                "a pass could not be captured and is computed as it is", exc_info=True,
                extra={"event": "base.not_captured"},
            )  # fmt: skip
            return None
        finally:
            self._body.finish()
            compute.wait_stream(self._stream)
        return graphs


def common_length(longest: int) -> int:
    """Rows are padded to one of four lengths between two powers of two: passes are of few structures then.

    A quarter more at most, and a multiple of 8.
    """
    step = max(8, (1 << (longest.bit_length() - 1)) // 4)
    return -(-longest // step) * step


def common_ghosts(members: Sequence[Member]) -> int:
    """A cohort that can be captured is filled up to 1, 2, 3, 4, 6, 8, 12, ... segments, for the same end."""
    if any(member.adapter.gang for member in members) or not all(map(_capturable, members)):
        return 0
    count = len(members)
    step = max(1, (1 << (count.bit_length() - 1)) // 2)
    return -count % step


class CapturedBody:
    """`Body` of one batch whose structure was captured."""

    def __init__(self, graphs: _Graphs, space: Workspace, carrier: CopyingCarrier, sink: TapSink) -> None:
        self._graphs, self._space, self._carrier, self._sink = graphs, space, carrier, sink
        self._cohorts: tuple[Cohort, ...] = ()

    @property
    def stacks(self) -> Stacks:
        return self._graphs.stacks

    def forward(self, batch: MixedBatch, stacks: Stacks, *, train: bool) -> Tensor:
        self._cohorts = batch.cohorts
        for number, cohort in enumerate(batch.cohorts):
            gathered_flats(cohort, number, self._space)
            part_scalings(cohort, number, self._space)
        self._graphs.tokens_BT.copy_(batch.tokens_BT)
        self._graphs.forward.replay()
        return self._graphs.hidden_ND

    def backward(self, grad_ND: Tensor) -> None:
        self._graphs.grad_ND.copy_(grad_ND)
        self._carrier.before_overwriting()
        self._graphs.backward.replay()
        recipients = [recipients_of(cohort, self._sink) for cohort in self._cohorts]
        for parcel in self._graphs.parcels:
            self._carrier.carry([parcel.bytes_P], parcel.for_recipients(recipients))

    def finish(self) -> None:
        self._cohorts = ()


class _Graphs:
    """One structure's operations, and the tensors that they begin and end with."""

    def __init__(self, batch: MixedBatch, device: torch.device) -> None:
        self._batch = replace(batch, tokens_BT=batch.tokens_BT.clone())
        self._device = device
        self.forward = torch.cuda.CUDAGraph()
        self.backward = torch.cuda.CUDAGraph()
        self.stacks: Stacks = {}
        self.hidden_ND = self.grad_ND = self.tokens_BT
        self.parcels: list[_Parcel] = []

    @property
    def tokens_BT(self) -> Tensor:
        return self._batch.tokens_BT

    def capture(self, body: Body, stacks: Callable[[TapOutlet], Stacks], pool: Any) -> None:
        """On the current stream. Computes nothing."""
        recorder = _Recorder(self._batch.cohorts, self._device)
        self.stacks = stacks(TapOutlet(_nobody, recorder))
        train = bool(self.stacks)
        self.hidden_ND = _captured(
            self.forward, pool, lambda: body.forward(self._batch, self.stacks, train=train)
        )
        if train:
            self.grad_ND = torch.empty_like(self.hidden_ND)
            self.parcels = _captured(self.backward, pool, lambda: _backward(body, self.grad_ND, recorder))


def _captured(graph: torch.cuda.CUDAGraph, pool: Any, work: Callable[[], T]) -> T:
    # Other threads may allocate and wait meanwhile: the taps' does.
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        return work()
    finally:
        graph.capture_end()


def _backward(body: Body, grad_ND: Tensor, recorder: _Recorder) -> list[_Parcel]:
    body.backward(grad_ND)
    return recorder.parcels()


def _nobody(_tap: Tap) -> None:
    raise AssertionError("a pass that is captured hands out nothing")


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some tensors of a parcel, and what is to be done with them."""

    places: tuple[tuple[int, int, torch.dtype, torch.Size], ...]  # start, bytes, dtype, shape
    cohort: int
    hand_out: Callable[[Recipients, Sequence[Tensor]], None]

    def of(self, bytes_P: Tensor) -> list[Tensor]:
        return [
            bytes_P[start : start + count].view(dtype).view(shape)
            for start, count, dtype, shape in self.places
        ]


@dataclass(frozen=True, slots=True)
class _Parcel:
    """Taps that lie together on the device, byte behind byte."""

    bytes_P: Tensor
    pieces: tuple[_Piece, ...]

    def for_recipients(self, recipients: Sequence[Recipients]) -> HandOut:
        def hand_out(copies: Sequence[Tensor]) -> None:
            for piece in self.pieces:
                piece.hand_out(recipients[piece.cohort], piece.of(copies[0]))

        return hand_out


@dataclass(slots=True)
class _Collected:
    """A parcel in the making."""

    parts: list[Tensor] = field(default_factory=list)
    pieces: list[_Piece] = field(default_factory=list)
    nbytes: int = 0


class _Recorder:
    """`TapCarrier` of a pass that is captured: notes what would be carried, and packs it."""

    crosses = True

    def __init__(self, cohorts: Sequence[Cohort], device: torch.device) -> None:
        self._cohort_of = {c.members[0].position: number for number, c in enumerate(cohorts)}
        self._padding = torch.zeros(_ALIGNMENT, dtype=torch.uint8, device=device)
        self._open = _Collected()
        self._parcels: list[_Parcel] = []

    def carry(self, tensors: Sequence[Tensor], hand_out: HandOut) -> None:
        assert isinstance(hand_out, Delivery), "a head's taps are no part of a captured pass"
        places = []
        for tensor in tensors:
            places.append((self._open.nbytes, tensor.nbytes, tensor.dtype, tensor.shape))
            self._add(tensor.contiguous().view(-1).view(torch.uint8))
        cohort = self._cohort_of[hand_out.recipients.segments[0]]
        self._open.pieces.append(_Piece(tuple(places), cohort, hand_out.hand_out))
        if self._open.nbytes >= PARCEL_BYTES:
            self._close()

    def behind(self, work: Callable[[], None]) -> None:
        raise AssertionError("nothing follows a pass that is not computed")

    def drained(self) -> None:
        """Nothing is on its way."""

    def parcels(self) -> list[_Parcel]:
        if self._open.parts:
            self._close()
        return self._parcels

    def _add(self, part: Tensor) -> None:
        missing = -part.numel() % _ALIGNMENT
        if missing:
            part = torch.cat([part, self._padding[:missing]])
        self._open.parts.append(part.view(torch.int32))  # copied faster than bytes
        self._open.nbytes += part.numel()

    def _close(self) -> None:
        packed = torch.cat(self._open.parts).view(torch.uint8)
        self._parcels.append(_Parcel(packed, tuple(self._open.pieces)))
        self._open = _Collected()


def _capturable(member: Member) -> bool:
    """What draws masks, or computes by autograd, is asked for anew each time."""
    kinds = [part.kind for part in member.adapter.spec.parts]
    return not any(isinstance(kind, ModuleKind) or input_dropout(kind) for kind in kinds)


def _structure(batch: MixedBatch) -> object:
    """Batches with equal ones ask for the same operations."""
    return tuple(batch.tokens_BT.shape), tuple(_cohort_structure(cohort) for cohort in batch.cohorts)


def _cohort_structure(cohort: Cohort) -> object:
    return cohort.span, len(cohort.stacked), _cohort_family(cohort)


def _family(batch: MixedBatch) -> object:
    """Batches with equal ones ask for the same operations but for their sizes."""
    return tuple(_cohort_family(cohort) for cohort in batch.cohorts)


def _cohort_family(cohort: Cohort) -> object:
    adapter = cohort.members[0].adapter
    return (
        adapter.layout,  # by identity
        cohort.taps,
        adapter.spec.dtype,
        cohort.gradient_dtypes,
    )
