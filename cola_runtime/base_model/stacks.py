"""The adapters of one mixed batch at one input group: their products and their taps, batched per cohort.

Per cohort:  y += (x A^T) (s B)^T,  dx += (g s B) A,  dA = (g s B)^T x,  dB = s g^T (x A^T).
Cohorts are slices of rows, never masks, so a NaN in one tenant's adapter cannot reach its neighbours.
Shapes: B rows, T tokens, S segments of a cohort, M tokens of one segment, I in_features, O out_features,
R rank, J adapted sites of the input group, Q = J * R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cola_runtime.adapters.lora import torch_dtype
from cola_runtime.base_model.layout import AdapterLayout, GroupFactors
from cola_runtime.base_model.segments import Cohort
from cola_runtime.gradients.taps import Tap, TapSink, activation_tensors, gradient_keys, split_gradients
from cola_runtime.types import Encoding, TensorKey


class CohortTaps:
    """Where a cohort's taps go and how they are encoded."""

    def __init__(self, cohort: Cohort, sink: TapSink) -> None:
        specs = [member.adapter.spec for member in cohort.members]
        self.encoding = cohort.encoding
        self._segments = [member.position for member in cohort.members]
        self._dtype = torch_dtype(specs[0])
        self._scalings_S11 = torch.tensor([spec.scaling for spec in specs], dtype=self._dtype)[:, None, None]
        self._sink = sink

    def emit_gradients(
        self, grad_a_SQI: Tensor, grads_b_SRO: list[Tensor], keys: Sequence[TensorKey]
    ) -> None:
        """`grads_b_SRO` lack the scaling s. `grad_a_SQI` is handed on as it is: give it away."""
        grads_a_SRI = grad_a_SQI.to(self._dtype).chunk(len(grads_b_SRO), dim=1)
        grads_b_SOR = [self._scaled_transpose(grad_SRO) for grad_SRO in grads_b_SRO]
        for segment, tensors in zip(
            self._segments, split_gradients(grads_a_SRI, grads_b_SOR, keys), strict=True
        ):
            self._sink(Tap(segment, tensors))

    def _scaled_transpose(self, grad_SRO: Tensor) -> Tensor:
        segments, rank, columns = grad_SRO.shape
        out_SOR = grad_SRO.new_empty((segments, columns, rank), dtype=self._dtype)
        return torch.mul(grad_SRO.transpose(1, 2), self._scalings_S11, out=out_SOR)

    def emit_activations(self, x_SMI: Tensor, grads_SMO: dict[int, Tensor]) -> None:
        for s, segment in enumerate(self._segments):
            tensors = activation_tensors(x_SMI[s], {site: grad[s] for site, grad in grads_SMO.items()})
            self._sink(Tap(segment, tensors))


@dataclass(frozen=True, slots=True)
class GroupStack:
    """One cohort at one input group."""

    first_row: int
    stop_row: int
    segments: int
    rank: int
    positions: tuple[int, ...]  # of the adapted sites among the group's sites
    factors: GroupFactors
    keys: tuple[TensorKey, ...]
    taps: CohortTaps | None  # None in a forward-only step

    def rows(self, tensor_BTF: Tensor) -> Tensor:
        """The cohort's rows as [S, M, F], a view; also of a tensor that is a slice of columns."""
        cut = tensor_BTF[self.first_row : self.stop_row]
        return cut.view(self.segments, -1, tensor_BTF.shape[-1])

    def add_to(self, outputs_BTO: Sequence[Tensor], x_BTI: Tensor) -> Tensor:
        """In place: outputs += (x A^T)(s B)^T. Returns x A^T, [S, M, Q]."""
        h_SMQ = torch.bmm(self.rows(x_BTI), self.factors.a_SQI.transpose(1, 2))
        h_parts = torch.split(h_SMQ, self.rank, dim=2)
        for position, h_SMR, b_SOR in zip(self.positions, h_parts, self.factors.b_SOR, strict=True):
            self.rows(outputs_BTO[position]).baddbmm_(h_SMR, b_SOR.transpose(1, 2))
        return h_SMQ

    def backward(
        self, x_BTI: Tensor, h_SMQ: Tensor, grads_BTO: Sequence[Tensor], dx_BTI: Tensor | None
    ) -> None:
        """In place: dx += (g s B) A. Hands out the taps."""
        grads_SMO = [self.rows(grads_BTO[position]) for position in self.positions]
        gb_SMQ = self._grad_times_b(grads_SMO)
        if dx_BTI is not None:
            self.rows(dx_BTI).baddbmm_(gb_SMQ, self.factors.a_SQI)
        if self.taps is None:
            return
        x_SMI = self.rows(x_BTI)
        if self.taps.encoding is Encoding.ACTIVATIONS:
            sites = [site.index for site in self.factors.sites]
            self.taps.emit_activations(x_SMI, dict(zip(sites, grads_SMO, strict=True)))
            return
        h_parts = torch.split(h_SMQ, self.rank, dim=2)
        grads_b_SRO = [
            torch.bmm(h_SMR.transpose(1, 2), grad) for grad, h_SMR in zip(grads_SMO, h_parts, strict=True)
        ]
        self.taps.emit_gradients(torch.bmm(gb_SMQ.transpose(1, 2), x_SMI), grads_b_SRO, self.keys)

    def _grad_times_b(self, grads_SMO: Sequence[Tensor]) -> Tensor:
        parts = [
            torch.bmm(grad_SMO, b_SOR) for grad_SMO, b_SOR in zip(grads_SMO, self.factors.b_SOR, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class StackCache:
    """Stacked factors of the cohorts of past steps; a step whose adapters did not change copies nothing.

    One slot per (layout, segments, ordinal): a member's new version replaces its old one in place. `limit`
    slots are kept, the least recently used goes first.
    """

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._slots: dict[tuple[AdapterLayout, int, int], _Slot] = {}

    def factors(self, cohort: Cohort, ordinal: int) -> dict[int, GroupFactors]:
        """Input group -> factors of the cohort; `ordinal` tells equal-shaped cohorts of one batch apart."""
        key = (cohort.members[0].adapter.layout, len(cohort.members), ordinal)
        slot = self._slots.pop(key, None) or _Slot(cohort)
        self._slots[key] = slot
        while len(self._slots) > self._limit:
            del self._slots[next(iter(self._slots))]
        slot.refresh(cohort)
        return slot.factors


class _Slot:
    """Dense blocks for one shape of cohort, and what is stacked in them now."""

    def __init__(self, cohort: Cohort) -> None:
        first = cohort.members[0].adapter
        members = len(cohort.members)
        self._sizes = first.layout.block_sizes()
        memory = first.flat.new_empty(members * first.layout.numel)
        blocks = [
            block.view(members, -1) for block in torch.split(memory, [members * size for size in self._sizes])
        ]
        self._rows = list(zip(*(block.split(1) for block in blocks), strict=True))  # type: ignore[no-untyped-call]
        self._held: list[Tensor | None] = [None] * members
        self.factors = first.layout.factors(blocks)

    def refresh(self, cohort: Cohort) -> None:
        """Copy in the members whose version is another than the one held; no temporary, no more copies."""
        for place, member in enumerate(cohort.members):
            flat = member.adapter.flat
            if self._held[place] is not flat:
                torch.split_with_sizes_copy(flat[None], self._sizes, dim=1, out=self._rows[place])
                self._held[place] = flat


def group_stacks(
    cohorts: Sequence[Cohort], positions: dict[int, int], cache: StackCache, sink: TapSink | None
) -> dict[int, list[GroupStack]]:
    """Input group -> its cohorts' stacks. `positions` maps a site's index to its place within its group."""
    stacks: dict[int, list[GroupStack]] = {}
    counts: dict[tuple[AdapterLayout, int], int] = {}
    for cohort in cohorts:
        shape = (cohort.members[0].adapter.layout, len(cohort.members))
        ordinal = counts[shape] = counts.get(shape, -1) + 1
        taps = None if sink is None else CohortTaps(cohort, sink)
        for group, factors in cache.factors(cohort, ordinal).items():
            stack = GroupStack(
                first_row=cohort.first_row,
                stop_row=cohort.stop_row,
                segments=len(cohort.members),
                rank=cohort.members[0].adapter.layout.rank,
                positions=tuple(positions[site.index] for site in factors.sites),
                factors=factors,
                keys=gradient_keys([site.index for site in factors.sites]),
                taps=taps,
            )
            stacks.setdefault(group, []).append(stack)
    return stacks
