"""One block per weight of every site, in the weights' own shapes: the layout of kinds that share nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod

from torch import Tensor

from cola_runtime.base_model.stacks.protocol import Scaled, by_input_group
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

    def scaled(
        self, weights: Mapping[TensorKey, Tensor], *, by: float, only: Collection[TensorKind] | None = None
    ) -> list[Scaled]:
        """In the blocks' order; `only` these kinds (None: all) times s."""
        return [Scaled(weights[key], by if only is None or key.kind in only else 1.0) for key in self._keys]

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
