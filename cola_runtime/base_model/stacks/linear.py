"""Stacked full-rank adapters:  y += x W^T + b,  dx += g W,  dW = s G,  db = s sum(g).

The scaling s is folded into W and b.
Shapes: S segments of a cohort, M tokens of one segment, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cola_runtime.adapter_spec import LinearKind
from cola_runtime.adapters.features import back, input_weight, outer, times
from cola_runtime.adapters.shapes import site_weight_shapes
from cola_runtime.base_model.stacks.protocol import CohortRows, Kept, Scaled
from cola_runtime.base_model.stacks.site_blocks import SiteBlocks, SiteViews
from cola_runtime.base_model.stacks.taps import GroupTaps
from cola_runtime.types import Site, TensorKey, TensorKind


class LinearLayout:
    """Every site's WEIGHT, then its BIAS if it has one."""

    def __init__(self, kind: LinearKind, sites: Sequence[Site]) -> None:
        self._blocks = SiteBlocks({site: site_weight_shapes(kind, site) for site in sites})
        self.groups, self.block_sizes = self._blocks.groups, self._blocks.sizes

    def scaled(self, weights: Mapping[TensorKey, Tensor], kind: LinearKind) -> list[Scaled]:
        return self._blocks.scaled(weights, by=kind.scaling)

    def views(self, blocks: Sequence[Tensor]) -> dict[int, Any]:
        return self._blocks.views(blocks)

    def stack(
        self, views: SiteViews, rows: CohortRows, positions: tuple[int, ...], taps: GroupTaps | None
    ) -> LinearStack:
        return LinearStack(rows, positions, views, taps)


@dataclass(frozen=True, slots=True)
class LinearStack:
    """`SiteStack` of one cohort's full-rank adapters at one input group."""

    rows: CohortRows
    positions: tuple[int, ...]
    views: SiteViews
    taps: GroupTaps | None

    def add_to(self, outputs_BTO: Sequence[Tensor], x_BTI: Tensor) -> Kept:
        x_SMI = self.rows.of(x_BTI)
        for position, (site, weights) in zip(self.positions, self.views.items(), strict=True):
            out_SMO, weight_SOI = self.rows.of(outputs_BTO[position]), _matrix(weights)
            if site.takes_ids or site.groups > 1:
                out_SMO.add_(times(x_SMI, weight_SOI, site.groups))
            else:
                out_SMO.baddbmm_(x_SMI, weight_SOI.transpose(1, 2))
            if (TensorKind.BIAS, 0) in weights:
                out_SMO.add_(weights[TensorKind.BIAS, 0].unsqueeze(1))
        return ()

    def backward(self, x_BTI: Tensor, kept: Kept, grads_BTO: Sequence[Tensor], dx_BTI: Tensor | None) -> None:
        grads_SMO = {
            site.index: self.rows.of(grads_BTO[position])
            for site, position in zip(self.views, self.positions, strict=True)
        }
        if dx_BTI is not None:
            dx_SMI = self.rows.of(dx_BTI)
            for site, weights in self.views.items():
                grad_SMO, weight_SOI = grads_SMO[site.index], _matrix(weights)
                if site.groups > 1:
                    dx_SMI.add_(back(grad_SMO, weight_SOI, site.groups))
                else:
                    dx_SMI.baddbmm_(grad_SMO, weight_SOI)
        if self.taps is not None:
            x_SMI = self.rows.of(x_BTI)
            self.taps.emit(x_SMI, grads_SMO, lambda: self._gradients(x_SMI, grads_SMO))

    def _gradients(self, x_SMI: Tensor, grads_SMO: Mapping[int, Tensor]) -> dict[TensorKey, Tensor]:
        assert self.taps is not None
        gradients: dict[TensorKey, Tensor] = {}
        for site, weights in self.views.items():
            grad_SMO = grads_SMO[site.index]
            product_SOI = self.taps.scale(outer(grad_SMO, x_SMI, site, site.groups))
            gradients[TensorKey(site.index, TensorKind.GRAD_WEIGHT)] = input_weight(product_SOI, site)
            if (TensorKind.BIAS, 0) in weights:
                sum_SO = grad_SMO.sum(dim=1)
                gradients[TensorKey(site.index, TensorKind.GRAD_BIAS)] = self.taps.scale(sum_SO)
        return gradients


def _matrix(weights: Mapping[tuple[TensorKind, int], Tensor]) -> Tensor:
    """WEIGHT as [S, O, I], I of one group."""
    return weights[TensorKind.WEIGHT, 0].flatten(2)
