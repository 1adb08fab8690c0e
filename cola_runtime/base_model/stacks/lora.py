"""Stacked LoRA:  y += (x A^T)(s B)^T,  dx += (g s B) A,  dA = (g s B)^T x,  dB = s g^T (x A^T).

The scaling s is folded into B once, at installation.
Shapes: B rows, T tokens, S segments of a cohort, M tokens of one segment, I in_features, O out_features,
R rank, J adapted sites of the input group, Q = J * R.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cola_runtime.adapter_spec import LoraKind
from cola_runtime.adapters.features import input_weight, outer, output_matrix, output_weight, times
from cola_runtime.base_model.stacks.protocol import CohortRows, Kept, Scaled, by_input_group
from cola_runtime.base_model.stacks.taps import GroupTaps
from cola_runtime.types import Site, TensorKey, TensorKind


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """Factors of S adapters at one input group, as views of their blocks."""

    sites: tuple[Site, ...]  # the adapted ones, in catalogue order
    a_SQI: Tensor  # A of all sites, one above the other
    b_SOR: tuple[Tensor, ...]  # s * B of each site


class LoraLayout:
    """[A of every site | s * B of every site], input group by input group.

    The A factors of one group are neighbours, thus one matrix [Q, I].
    """

    def __init__(self, rank: int, sites: Sequence[Site]) -> None:
        self.groups = by_input_group(sites)
        self._rank = rank
        self._sites = [site for group in self.groups.values() for site in group]
        self._a_keys = [TensorKey(site.index, TensorKind.LORA_A) for site in self._sites]
        self._b_keys = [TensorKey(site.index, TensorKind.LORA_B) for site in self._sites]
        self.block_sizes = (
            *(len(group) * rank * group[0].in_features for group in self.groups.values()),
            *(rank * site.out_features for site in self._sites),
        )

    def scaled(self, weights: Mapping[TensorKey, Tensor], kind: LoraKind) -> list[Scaled]:
        scaling = kind.scaling
        return [
            *(Scaled(weights[key]) for key in self._a_keys),
            *(
                Scaled(output_matrix(weights[key], site), scaling)
                for key, site in zip(self._b_keys, self._sites, strict=True)
            ),
        ]

    def views(self, blocks: Sequence[Tensor]) -> dict[int, LoraFactors]:
        """Batched products clone what is not dense, hence blocks and not slices of one stacked vector."""
        blocks_b = iter(blocks[len(self.groups) :])
        return {
            group: LoraFactors(
                sites,
                _matrices(block_a, sites[0].in_features),
                tuple(_matrices(next(blocks_b), self._rank) for _ in sites),
            )
            for (group, sites), block_a in zip(self.groups.items(), blocks, strict=False)
        }

    def stack(
        self, views: LoraFactors, rows: CohortRows, positions: tuple[int, ...], taps: GroupTaps | None
    ) -> LoraStack:
        return LoraStack(rows, self._rank, positions, views, taps)


@dataclass(frozen=True, slots=True)
class LoraStack:
    """`SiteStack` of one cohort's LoRA at one input group."""

    rows: CohortRows
    rank: int
    positions: tuple[int, ...]
    factors: LoraFactors
    taps: GroupTaps | None

    def add_to(self, outputs_BTO: Sequence[Tensor], x_BTI: Tensor) -> Kept:
        """Keeps x A^T, [S, M, Q]."""
        h_SMQ = times(self.rows.of(x_BTI), self.factors.a_SQI)
        h_parts = torch.split(h_SMQ, self.rank, dim=2)
        for position, h_SMR, b_SOR in zip(self.positions, h_parts, self.factors.b_SOR, strict=True):
            self.rows.of(outputs_BTO[position]).baddbmm_(h_SMR, b_SOR.transpose(1, 2))
        return (h_SMQ,)

    def backward(self, x_BTI: Tensor, kept: Kept, grads_BTO: Sequence[Tensor], dx_BTI: Tensor | None) -> None:
        (h_SMQ,) = kept
        grads_SMO = [self.rows.of(grads_BTO[position]) for position in self.positions]
        gb_SMQ = self._grad_times_b(grads_SMO)
        if dx_BTI is not None:
            self.rows.of(dx_BTI).baddbmm_(gb_SMQ, self.factors.a_SQI)
        if self.taps is not None:
            self._emit(self.rows.of(x_BTI), h_SMQ, gb_SMQ, grads_SMO)

    def _emit(self, x_SMI: Tensor, h_SMQ: Tensor, gb_SMQ: Tensor, grads_SMO: Sequence[Tensor]) -> None:
        assert self.taps is not None
        by_site = {site.index: grad for site, grad in zip(self.factors.sites, grads_SMO, strict=True)}
        self.taps.emit(x_SMI, by_site, lambda: self._gradients(x_SMI, h_SMQ, gb_SMQ, grads_SMO))

    def _gradients(
        self, x_SMI: Tensor, h_SMQ: Tensor, gb_SMQ: Tensor, grads_SMO: Sequence[Tensor]
    ) -> dict[TensorKey, Tensor]:
        assert self.taps is not None
        grad_a_SQI = outer(gb_SMQ, x_SMI, self.factors.sites[0]).to(self.taps.dtype)
        scalings_S11 = self.taps.scalings_S[:, None, None]
        gradients: dict[TensorKey, Tensor] = {}
        for site, grad_a_SRI, h_SMR, grad_SMO in zip(
            self.factors.sites,
            torch.split(grad_a_SQI, self.rank, dim=1),
            torch.split(h_SMQ, self.rank, dim=2),
            grads_SMO,
            strict=True,
        ):
            grad_b_SOR = _scaled_transpose(torch.bmm(h_SMR.transpose(1, 2), grad_SMO), scalings_S11)
            gradients.update(self._factor_gradients(site, grad_a_SRI, grad_b_SOR))
        return gradients

    def _factor_gradients(
        self, site: Site, grad_a_SRI: Tensor, grad_b_SOR: Tensor
    ) -> dict[TensorKey, Tensor]:
        return {
            TensorKey(site.index, TensorKind.GRAD_LORA_A): input_weight(grad_a_SRI, site),
            TensorKey(site.index, TensorKind.GRAD_LORA_B): output_weight(grad_b_SOR, site),
        }

    def _grad_times_b(self, grads_SMO: Sequence[Tensor]) -> Tensor:
        parts = [
            torch.bmm(grad_SMO, b_SOR) for grad_SMO, b_SOR in zip(grads_SMO, self.factors.b_SOR, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _scaled_transpose(grad_SRO: Tensor, scalings_S11: Tensor) -> Tensor:
    """In the wider dtype, dense. Scaling what is strided takes a processor three times as long in 16 bits."""
    if not grad_SRO.is_cuda:
        return torch.mul(grad_SRO, scalings_S11).transpose(1, 2).contiguous()
    segments, rank, columns = grad_SRO.shape
    out_SOR = grad_SRO.new_empty((segments, columns, rank), dtype=scalings_S11.dtype)
    return torch.mul(grad_SRO.transpose(1, 2), scalings_S11, out=out_SOR)


def _matrices(block_SP: Tensor, columns: int) -> Tensor:
    return block_SP.view(len(block_SP), -1, columns)
