"""Registered modules, segment by segment: their forward and, by autograd, their vector-Jacobian products.

What a module computes is unknown, so nothing of it is batched over tenants.
Shapes: S segments of a cohort, M tokens of one segment, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cola_runtime.adapter_spec import ModuleKind
from cola_runtime.adapters.modules import SiteModule
from cola_runtime.adapters.shapes import site_weight_shapes
from cola_runtime.base_model.stacks.protocol import CohortRows, Kept, Scaled
from cola_runtime.base_model.stacks.site_blocks import SiteBlocks, SiteViews
from cola_runtime.base_model.stacks.taps import GroupTaps
from cola_runtime.types import Site, TensorKey


class ModuleLayout:
    """Every site's parameters. The scaling is not folded in: a module need not be linear in any of them."""

    def __init__(self, kind: ModuleKind, sites: Sequence[Site]) -> None:
        self._blocks = SiteBlocks({site: site_weight_shapes(kind, site) for site in sites})
        unscaled = kind.model_copy(update={"scaling": 1.0})
        self._modules = {site: SiteModule(unscaled, site) for site in sites}
        self.groups, self.block_sizes = self._blocks.groups, self._blocks.sizes

    def scaled(self, weights: Mapping[TensorKey, Tensor], kind: ModuleKind) -> list[Scaled]:
        return self._blocks.scaled(weights, by=1.0)

    def views(self, blocks: Sequence[Tensor]) -> dict[int, Any]:
        return self._blocks.views(blocks)

    def stack(
        self, views: SiteViews, rows: CohortRows, positions: tuple[int, ...], taps: GroupTaps | None
    ) -> ModuleStack:
        return ModuleStack(rows, positions, views, self._modules, taps)


@dataclass(frozen=True, slots=True)
class ModuleStack:
    """`SiteStack` of one cohort's registered modules at one input group."""

    rows: CohortRows
    positions: tuple[int, ...]
    views: SiteViews
    modules: Mapping[Site, SiteModule]
    taps: GroupTaps | None

    def add_to(self, outputs_BTO: Sequence[Tensor], x_BTI: Tensor) -> Kept:
        """Keeps nothing: backward computes each segment again, with autograd."""
        x_SMI = self.rows.of(x_BTI)
        for position, site in zip(self.positions, self.views, strict=True):
            out_SMO = self.rows.of(outputs_BTO[position])
            for s in range(self.rows.segments):
                out_SMO[s] += self.rows.scalings[s] * self.modules[site].forward(
                    x_SMI[s], self._weights(site, s)
                )
        return ()

    def backward(self, x_BTI: Tensor, kept: Kept, grads_BTO: Sequence[Tensor], dx_BTI: Tensor | None) -> None:
        x_SMI = self.rows.of(x_BTI)
        grads_SMO = {
            site.index: self.rows.of(grads_BTO[position])
            for site, position in zip(self.views, self.positions, strict=True)
        }
        if dx_BTI is not None:
            dx_SMI = self.rows.of(dx_BTI)
            for site in self.views:
                for s in range(self.rows.segments):
                    dx_SMI[s] += self._input_gradient(site, s, x_SMI[s], grads_SMO[site.index][s])
        if self.taps is not None:
            self.taps.emit(x_SMI, grads_SMO, lambda: self._gradients(x_SMI, grads_SMO))

    def _weights(self, site: Site, s: int) -> dict[TensorKey, Tensor]:
        return {
            TensorKey(site.index, kind, slot): weight[s] for (kind, slot), weight in self.views[site].items()
        }

    def _input_gradient(self, site: Site, s: int, x_MI: Tensor, grad_MO: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf_MI = x_MI.detach().requires_grad_(True)
            output_MO = self.modules[site].forward(leaf_MI, self._weights(site, s))
            (dx_MI,) = torch.autograd.grad(
                output_MO, leaf_MI, self.rows.scalings[s] * grad_MO, allow_unused=True, materialize_grads=True
            )
        return dx_MI

    def _gradients(self, x_SMI: Tensor, grads_SMO: Mapping[int, Tensor]) -> dict[TensorKey, Tensor]:
        assert self.taps is not None
        gradients: dict[TensorKey, Tensor] = {}
        for site in self.views:
            of_segments = [
                self.modules[site].gradient(x_SMI[s], grads_SMO[site.index][s], self._weights(site, s))
                for s in range(self.rows.segments)
            ]
            for key in of_segments[0]:
                stacked = torch.stack([of_segment[key] for of_segment in of_segments])
                gradients[key.gradient] = self.taps.scale(stacked)
        return gradients
