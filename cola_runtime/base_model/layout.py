"""How one adapter's factors lie in one flat vector, so that equal adapters stack with a single copy.

The vector is [A of every site | s * B of every site], input group by input group: the A factors of one group
are neighbours, thus one matrix [J*R, I]. The scaling s is folded into B once, at installation.
Shapes: R rank, I in_features, O out_features, J adapted sites of one input group, S segments, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from cola_runtime.types import AdapterSpec, Site, TensorKey, TensorKind


@dataclass(frozen=True, slots=True)
class GroupFactors:
    """Factors of S adapters at one input group, as views of their stacked vectors."""

    sites: tuple[Site, ...]  # the adapted ones, in catalogue order
    a_SQI: Tensor  # Q = J * R: A of all sites, one above the other
    b_SOR: tuple[Tensor, ...]  # s * B of each site


@dataclass(frozen=True, slots=True, eq=False)
class AdapterLayout:
    """Offsets of every factor. The bank keeps one per (rank, sites), so identity is equality."""

    rank: int
    groups: tuple[tuple[Site, ...], ...]  # adapted sites that share one x
    a_numel: int
    numel: int

    @staticmethod
    def of(spec: AdapterSpec) -> AdapterLayout:
        ordered = sorted(spec.sites, key=lambda site: (site.input_group, site.index))
        groups = tuple(tuple(sites) for _, sites in groupby(ordered, key=lambda site: site.input_group))
        a_numel = sum(spec.rank * site.in_features for site in ordered)
        b_numel = sum(spec.rank * site.out_features for site in ordered)
        return AdapterLayout(spec.rank, groups, a_numel, a_numel + b_numel)

    @property
    def sites(self) -> Iterator[Site]:
        return (site for group in self.groups for site in group)

    def flatten(self, weights: Mapping[TensorKey, Tensor], scaling: float, dtype: torch.dtype) -> Tensor:
        """[P]: a copy of all factors; s goes into B in the wider of both dtypes, then rounded to `dtype`."""
        flat = torch.cat(
            [weights[TensorKey(site.index, kind)].reshape(-1) for kind in _FACTORS for site in self.sites]
        )
        flat = flat.to(torch.promote_types(flat.dtype, dtype))
        flat[self.a_numel :] *= scaling
        return flat.to(dtype)

    def block_sizes(self) -> list[int]:
        """Lengths of the vector's blocks: A of each group, then B of each site."""
        sizes = [len(sites) * self.rank * sites[0].in_features for sites in self.groups]
        return sizes + [self.rank * site.out_features for site in self.sites]

    def factors(self, blocks: Sequence[Tensor]) -> dict[int, GroupFactors]:
        """Input group -> factors, as views of `blocks`: [S, n] each, contiguous, cut by `block_sizes`.

        Batched products clone what is not dense, hence blocks and not slices of one stacked vector.
        """
        blocks_b = iter(blocks[len(self.groups) :])
        return {
            sites[0].input_group: GroupFactors(
                sites,
                _matrices(block_a, sites[0].in_features),
                tuple(_matrices(next(blocks_b), self.rank) for _ in sites),
            )
            for sites, block_a in zip(self.groups, blocks, strict=False)
        }


def _matrices(block_SP: Tensor, columns: int) -> Tensor:
    return block_SP.view(len(block_SP), -1, columns)


_FACTORS = (TensorKind.LORA_A, TensorKind.LORA_B)
