"""Stacked MLPs:  y += act(x W1^T + b1) W2^T + b2; the scaling s is folded into W2 and b2.

Shapes: S segments of a cohort, M tokens of one segment, I in_features, O out_features, F hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cola_runtime.adapter_spec import MlpKind
from cola_runtime.adapters.mlp import activation_slope
from cola_runtime.adapters.shapes import site_weight_shapes
from cola_runtime.base_model.stacks.protocol import CohortRows, Kept, Scaled
from cola_runtime.base_model.stacks.site_blocks import SiteBlocks, SiteViews
from cola_runtime.base_model.stacks.taps import GroupTaps
from cola_runtime.types import Site, TensorKey, TensorKind

_IN, _IN_BIAS = (TensorKind.MLP_IN, 0), (TensorKind.MLP_IN_BIAS, 0)
_OUT, _OUT_BIAS = (TensorKind.MLP_OUT, 0), (TensorKind.MLP_OUT_BIAS, 0)


class MlpLayout:
    """Every site's four weights."""

    def __init__(self, kind: MlpKind, sites: Sequence[Site]) -> None:
        self._activation = kind.activation
        self._blocks = SiteBlocks({site: site_weight_shapes(kind, site) for site in sites})
        self.groups, self.block_sizes = self._blocks.groups, self._blocks.sizes

    def scaled(self, weights: Mapping[TensorKey, Tensor], kind: MlpKind) -> list[Scaled]:
        return self._blocks.scaled(
            weights, by=kind.scaling, only=(TensorKind.MLP_OUT, TensorKind.MLP_OUT_BIAS)
        )

    def views(self, blocks: Sequence[Tensor]) -> dict[int, Any]:
        return self._blocks.views(blocks)

    def stack(
        self, views: SiteViews, rows: CohortRows, positions: tuple[int, ...], taps: GroupTaps | None
    ) -> MlpStack:
        return MlpStack(rows, positions, views, self._activation, taps)


@dataclass(frozen=True, slots=True)
class MlpStack:
    """`SiteStack` of one cohort's MLPs at one input group."""

    rows: CohortRows
    positions: tuple[int, ...]
    views: SiteViews
    activation: str
    taps: GroupTaps | None

    def add_to(self, outputs_BTO: Sequence[Tensor], x_BTI: Tensor) -> Kept:
        """Keeps act(u) and act'(u) of every site, [S, M, F]."""
        x_SMI = self.rows.of(x_BTI)
        kept: list[Tensor] = []
        for position, weights in zip(self.positions, self.views.values(), strict=True):
            u_SMF = torch.baddbmm(weights[_IN_BIAS].unsqueeze(1), x_SMI, weights[_IN].transpose(1, 2))
            h_SMF, slope_SMF = activation_slope(self.activation, u_SMF)
            out_SMO = self.rows.of(outputs_BTO[position])
            out_SMO.baddbmm_(h_SMF, weights[_OUT].transpose(1, 2)).add_(weights[_OUT_BIAS].unsqueeze(1))
            kept += [h_SMF, slope_SMF]
        return tuple(kept)

    def backward(self, x_BTI: Tensor, kept: Kept, grads_BTO: Sequence[Tensor], dx_BTI: Tensor | None) -> None:
        grads_SMO = {
            site.index: self.rows.of(grads_BTO[position])
            for site, position in zip(self.views, self.positions, strict=True)
        }
        slopes_SMF = kept[1::2]
        grads_u_SMF = [
            torch.bmm(grads_SMO[site.index], weights[_OUT]).mul_(slope_SMF)
            for (site, weights), slope_SMF in zip(self.views.items(), slopes_SMF, strict=True)
        ]
        if dx_BTI is not None:
            dx_SMI = self.rows.of(dx_BTI)
            for grad_u_SMF, weights in zip(grads_u_SMF, self.views.values(), strict=True):
                dx_SMI.baddbmm_(grad_u_SMF, weights[_IN])
        if self.taps is not None:
            x_SMI = self.rows.of(x_BTI)
            self.taps.emit(
                x_SMI, grads_SMO, lambda: self._gradients(x_SMI, kept[::2], grads_u_SMF, grads_SMO)
            )

    def _gradients(
        self,
        x_SMI: Tensor,
        hidden_SMF: Sequence[Tensor],
        grads_u_SMF: Sequence[Tensor],
        grads_SMO: Mapping[int, Tensor],
    ) -> dict[TensorKey, Tensor]:
        """s is in grad u already, through W2."""
        assert self.taps is not None
        gradients: dict[TensorKey, Tensor] = {}
        for site, h_SMF, grad_u_SMF in zip(self.views, hidden_SMF, grads_u_SMF, strict=True):
            grad_SMO = grads_SMO[site.index]
            of_site = {
                TensorKind.GRAD_MLP_IN: torch.bmm(grad_u_SMF.transpose(1, 2), x_SMI).to(self.taps.dtype),
                TensorKind.GRAD_MLP_IN_BIAS: grad_u_SMF.sum(dim=1).to(self.taps.dtype),
                TensorKind.GRAD_MLP_OUT: self.taps.scale(torch.bmm(grad_SMO.transpose(1, 2), h_SMF)),
                TensorKind.GRAD_MLP_OUT_BIAS: self.taps.scale(grad_SMO.sum(dim=1)),
            }
            gradients.update({TensorKey(site.index, kind): grad for kind, grad in of_site.items()})
        return gradients
