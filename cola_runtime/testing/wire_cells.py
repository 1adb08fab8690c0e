"""Bytes and CPU of one step's taps, input group by input group, through the runtime's own functions.

The real stacks make what a backward pass hands out; it is compressed, framed, read back, decoded and added
up as on a device. Only x and g are random. All on one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cola_runtime.adapter_spec import AdapterKind, AdapterPart, AdapterSpec
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.base_model.layout import AdapterLayout
from cola_runtime.base_model.segments import GradientDtypes
from cola_runtime.base_model.stacks.cohorts import GatheredStack
from cola_runtime.base_model.stacks.protocol import CohortRows, SiteStack, Span
from cola_runtime.base_model.stacks.taps import GroupTaps, OwnGradients
from cola_runtime.base_model.tap_carrier import DirectCarrier, Recipients
from cola_runtime.base_model.workspace import Workspace
from cola_runtime.encodings import Compression, Encoding, TapPlan
from cola_runtime.gradients.accumulate import GradientAccumulator
from cola_runtime.gradients.compression import TapCompressor
from cola_runtime.gradients.planner import encodings_of
from cola_runtime.gradients.taps import Tap
from cola_runtime.transport.frames import DType, Frame, TensorAddress
from cola_runtime.transport.packs import ReceivedPack
from cola_runtime.transport.reader import FrameLimits, FrameReader, ReceivedTensor
from cola_runtime.transport.tensors import parcels, tap_from_wire, tensors_from_wire, vector_from_wire
from cola_runtime.types import Lease, Site, TensorKey, TensorKind

LEASE = Lease(job_id="job-" + "0" * 32, epoch=1, device_id="here")
ADDRESS = TensorAddress(LEASE.job_id, LEASE.epoch, version=0, kind=TensorKind.BLOB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One input group's taps of one microbatch; CPU seconds of one thread, frames included."""

    bytes_up: int  # frame headers included
    base_seconds: float  # beyond the forward and backward pass: products, compression, frames
    device_seconds: float  # frames, decoding, gradient

    def seconds(self, link_bytes_per_second: float) -> float:
        return self.bytes_up / link_bytes_per_second + self.base_seconds + self.device_seconds


def possible_plans(kind: AdapterKind) -> list[TapPlan]:
    """Every encoding of the kind under every compression that it may have."""
    plans = [
        TapPlan(encoding, compression=compression)
        for encoding in encodings_of(kind)
        for compression in Compression
        if compression is not Compression.LOW_RANK
    ]
    if kind.kind == "linear":
        plans.append(TapPlan(Encoding.WEIGHT_GRADIENT, compression=Compression.LOW_RANK))
    return plans


def measure_cells(
    kind: AdapterKind, sites: Sequence[Site], rows: int, *, dtype: torch.dtype, rounds: int
) -> dict[TapPlan, Cell]:
    """Of the sites of one input group, under every possible plan, in turn; medians over `rounds`."""
    group = _Group(kind, sites, rows, dtype)
    plans = possible_plans(kind)
    measured: dict[TapPlan, list[Cell]] = {plan: [] for plan in plans}
    for number in range(rounds + 1):
        for plan in plans:
            cell = group.measure(plan)
            if number > 0:  # the first round touches memory for the first time
                measured[plan].append(cell)
    return {plan: _median(cells) for plan, cells in measured.items()}


def _median(cells: Sequence[Cell]) -> Cell:
    return Cell(
        bytes_up=cells[0].bytes_up,
        base_seconds=statistics.median(cell.base_seconds for cell in cells),
        device_seconds=statistics.median(cell.device_seconds for cell in cells),
    )


class _TimedTaps(GroupTaps):
    """The real one, with a clock around what it does."""

    seconds = 0.0

    def emit(self, x_SMI: Tensor, grads_SMO: Mapping[int, Tensor], own: OwnGradients) -> None:
        started = time.thread_time()
        super().emit(x_SMI, grads_SMO, own)
        self.seconds += time.thread_time() - started


class _Group:
    """One adapter at one input group, its weights, and a microbatch's x and g."""

    def __init__(self, kind: AdapterKind, sites: Sequence[Site], rows: int, dtype: torch.dtype) -> None:
        self._spec = AdapterSpec(parts=(AdapterPart(kind=kind, sites=tuple(sites)),), seed=0)
        self._weights = initial_weights(self._spec)
        self._sites, self._dtype = sites, dtype
        self._x_BTI = torch.randn(1, rows, sites[0].in_features).to(dtype)
        self._grads_BTO = [torch.randn(1, rows, site.out_features).to(dtype) for site in sites]
        self._accumulator = GradientAccumulator(self._spec)
        self._compressor = TapCompressor()

    def measure(self, plan: TapPlan) -> Cell:
        frames: list[Frame] = []

        def sink(tap: Tap) -> None:
            compressed = self._compressor.compress(LEASE, plan.compression, tap.tensors)
            frames.extend(frame for parcel in parcels(compressed) for frame in parcel.frames(ADDRESS))

        dtypes = GradientDtypes.of(self._spec, self._dtype)
        taps = _TimedTaps(
            plan.encoding,
            site=self._sites[0],
            recipients=Recipients(segments=[0], loss_scales=[1.0], sink=sink),
            scalings_S=torch.tensor([self._scaling], dtype=dtypes.own[0]),
            product_dtype=dtypes.product,
            carrier=DirectCarrier(),
        )
        stack = self._stack(taps)
        outputs_BTO = [torch.zeros_like(grad) for grad in self._grads_BTO]
        kept = stack.add_to(outputs_BTO, self._x_BTI)
        stack.backward(self._x_BTI, kept, self._grads_BTO, None)
        messages = [b"".join(frame) for frame in frames]
        return Cell(
            bytes_up=sum(map(len, messages)), base_seconds=taps.seconds, device_seconds=self._add(messages)
        )

    @property
    def _scaling(self) -> float:
        return self._spec.parts[0].kind.scaling

    def _stack(self, taps: GroupTaps) -> SiteStack:
        layout = AdapterLayout.of(self._spec)
        (piece,) = layout.pieces
        blocks = layout.blocks(layout.flatten(self._weights, self._spec, self._dtype))
        rows, positions = CohortRows(Span(0, 1), (self._scaling,)), tuple(range(len(self._sites)))
        return GatheredStack(piece.layout, (blocks,), rows, positions, taps, Workspace()).stack()

    def _add(self, messages: Sequence[bytes]) -> float:
        """What a device does with them; returns its CPU seconds."""
        started = time.thread_time()
        reader = FrameReader(FrameLimits(packs=True))
        for message in messages:
            for item in reader.feed(message):
                assert isinstance(item, ReceivedTensor | ReceivedPack)
                self._add_one(item)
        assert self._accumulator.complete
        return time.thread_time() - started

    def _add_one(self, item: ReceivedTensor | ReceivedPack) -> None:
        if isinstance(item, ReceivedTensor):
            key = TensorKey(item.address.site, item.address.kind, item.address.slot)
            self._accumulator.add(key, tap_from_wire(item, torch.float32), self._weights)
        elif item.dtype is DType.INT8_BLOCKS:
            for key, tensor in tensors_from_wire(item, torch.float32):
                self._accumulator.add(key, tensor, self._weights)
        else:
            self._accumulator.add_packed(item.contents.packed, vector_from_wire(item), self._weights)
