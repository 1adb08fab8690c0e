"""Stacked L-LoRA: s (dB A0 + B0 dA) x is a LoRA of twice the rank, with A = [A0; dA] and B = [dB, B0].

Of its gradients the lower half of dA and the left half of dB belong to the deltas. With B0 = 0 the second
term is gone: a LoRA of the same rank with a fixed A. Shapes as in `lora`; D rank of the deltas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cola_runtime.adapter_spec import LinearizedLoraKind
from cola_runtime.adapters.features import input_weight, output_weight
from cola_runtime.adapters.linearized_lora import SiteLinearizedLora
from cola_runtime.base_model.stacks.lora import LoraFactors, LoraLayout, LoraStack
from cola_runtime.base_model.stacks.protocol import CohortRows, Scaled
from cola_runtime.base_model.stacks.taps import GroupTaps
from cola_runtime.types import Site, TensorKey, TensorKind


class LinearizedLoraLayout:
    """A `LoraLayout` of rank 2 D, or of rank D where B0 is zero."""

    def __init__(self, kind: LinearizedLoraKind, sites: Sequence[Site]) -> None:
        self._both = kind.initial_b != "zero"
        self._rank = kind.rank
        self._lora = LoraLayout(2 * kind.rank if self._both else kind.rank, sites)
        self.groups, self.block_sizes = self._lora.groups, self._lora.block_sizes
        self._sites = [site for group in self.groups.values() for site in group]
        self._bases: dict[int, list[SiteLinearizedLora]] = {}  # by base_seed: the draws are made once

    def scaled(self, weights: Mapping[TensorKey, Tensor], kind: LinearizedLoraKind) -> list[Scaled]:
        bases = self._bases.get(kind.base_seed)
        if bases is None:
            bases = self._bases[kind.base_seed] = [SiteLinearizedLora(kind, site) for site in self._sites]
        pairs = [self._factors(base, weights) for base in bases]
        return [*(Scaled(a_RI) for a_RI, _ in pairs), *(Scaled(b_OR, kind.scaling) for _, b_OR in pairs)]

    def views(self, blocks: Sequence[Tensor]) -> dict[int, Any]:
        return self._lora.views(blocks)

    def stack(
        self, views: LoraFactors, rows: CohortRows, positions: tuple[int, ...], taps: GroupTaps | None
    ) -> LinearizedLoraStack:
        lora = self._lora.stack(views, rows, positions, taps)
        return LinearizedLoraStack(lora.rows, lora.rank, lora.positions, lora.factors, lora.taps, self._rank)

    def _factors(
        self, base: SiteLinearizedLora, weights: Mapping[TensorKey, Tensor]
    ) -> tuple[Tensor, Tensor]:
        delta_a_DI, delta_b_OD = base.deltas(weights)
        a_DI, b_OD = base.base_a_RI.to(delta_a_DI.dtype), base.base_b_OR.to(delta_b_OD.dtype)
        if not self._both:
            return a_DI, delta_b_OD
        return torch.cat([a_DI, delta_a_DI]), torch.cat([delta_b_OD, b_OD], dim=1)


@dataclass(frozen=True, slots=True)
class LinearizedLoraStack(LoraStack):
    """`SiteStack` of one cohort's L-LoRA at one input group."""

    deltas: int  # D

    def _factor_gradients(
        self, site: Site, grad_a_SRI: Tensor, grad_b_SOR: Tensor
    ) -> dict[TensorKey, Tensor]:
        gradients: dict[TensorKey, Tensor] = {}
        if self.rank > self.deltas:
            delta_a_SDI = grad_a_SRI[:, self.deltas :].contiguous()
            gradients[TensorKey(site.index, TensorKind.GRAD_DELTA_A)] = input_weight(delta_a_SDI, site)
        delta_b_SOD = grad_b_SOR[:, :, : self.deltas].contiguous()
        gradients[TensorKey(site.index, TensorKind.GRAD_DELTA_B)] = output_weight(delta_b_SOD, site)
        return gradients
