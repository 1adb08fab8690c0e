"""One block per weight of every site, in the weights' own shapes: the layout of kinds that share nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from cola_runtime.base_model.stacks.protocol import by_input_group
from cola_runtime.types import Site, TensorKey, TensorKind

SiteViews = dict[Site, dict[tuple[TensorKind, int], Tensor]]
"""The sites of one input group -> (kind, slot) -> the stacked weight, [S, ...]."""


class SiteBlocks:
    """Site by site in catalogue order, each site's weights in their fixed order."""

    def __init__(self, shapes: Mapping[Site, Mapping[TensorKey, tuple[int, ...]]]) -> None:
        self.groups = by_input_group(list(shapes))
        self._shapes = {site: dict(shapes[site]) for sites in self.groups.values() for site in sites}
        self._keys = [key for of_site in self._shapes.values() for key in of_site]
        self.sizes = tuple(prod(shape) for of_site in self._shapes.values() for shape in of_site.values())

    def flatten(
        self,
        weights: Mapping[TensorKey, Tensor],
        dtype: torch.dtype,
        *,
        scaling: float,
        scaled: frozenset[TensorKind] | None = None,
    ) -> Tensor:
        """A copy in the blocks' order; `scaled` kinds (None: all) times s, in the wider of both dtypes."""
        flat = torch.cat([weights[key].reshape(-1) for key in self._keys])
        flat = flat.to(torch.promote_types(flat.dtype, dtype))
        for key, block in zip(self._keys, torch.split(flat, list(self.sizes)), strict=True):
            if scaled is None or key.kind in scaled:
                block *= scaling
        return flat.to(dtype)

    def views(self, blocks: Sequence[Tensor]) -> dict[int, SiteViews]:
        """Input group -> views of `blocks`, [S, P] each."""
        remaining = iter(blocks)
        views: dict[int, SiteViews] = {}
        for site, of_site in self._shapes.items():
            views.setdefault(site.input_group, {})[site] = {
                (key.kind, key.slot): _shaped(next(remaining), shape) for key, shape in of_site.items()
            }
        return views


def _shaped(block_SP: Tensor, shape: tuple[int, ...]) -> Tensor:
    return block_SP.view(len(block_SP), *shape)
