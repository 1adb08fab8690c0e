"""Beside merged base weights nothing is left to compute but biases and taps: the cost of no adapter at all.

A stack adds nothing in the forward pass and no dx in the backward pass, since W = W0 + sum_k p_k delta_k has
both. g is handed out as it is, not times p_k: ColA's collaboration (docs/modes.md).
Shapes: S segments of a cohort, M tokens of one segment, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cola_runtime.adapters.adapter import torch_dtype
from cola_runtime.base_model.bank import MergedAdapter
from cola_runtime.base_model.segments import Cohort
from cola_runtime.base_model.site_groups import SiteGroup
from cola_runtime.base_model.stacks.cohorts import Stacks, cohort_taps
from cola_runtime.base_model.stacks.protocol import CohortRows, Kept
from cola_runtime.base_model.stacks.taps import GroupTaps
from cola_runtime.base_model.tap_carrier import TapOutlet
from cola_runtime.types import Site, TensorKey


def bias_stacks(biases: Mapping[int, Tensor], groups: Sequence[SiteGroup]) -> Stacks:
    """One stack for all rows at every input group where the gang has a bias [O]."""
    stacks: Stacks = {}
    for group in groups:
        at_position = {p: biases[site.index] for p, site in enumerate(group.sites) if site.index in biases}
        if at_position:
            stacks[group.sites[0].input_group] = [BiasStack(at_position)]
    return stacks


def tap_stacks(
    stacks: Stacks, cohorts: Sequence[Cohort], positions: Mapping[int, int], outlet: TapOutlet
) -> Stacks:
    """`stacks` and those that hand out every cohort's taps. `positions`: see `group_stacks`."""
    for cohort in cohorts:
        members = tuple(m.adapter.merged for m in cohort.members if m.adapter.merged is not None)
        rows = CohortRows(cohort.span, (1.0,) * len(members))
        ones_S = torch.ones(len(members), dtype=torch_dtype(cohort.members[0].adapter.spec))
        for piece in cohort.members[0].adapter.layout.pieces:
            for group, sites in piece.layout.groups.items():
                taps = cohort_taps(cohort, sites[0], ones_S, ones_S.dtype, outlet)
                places = tuple(positions[site.index] for site in sites)
                stacks.setdefault(group, []).append(TapStack(rows, places, sites, members, taps))
    return stacks


@dataclass(frozen=True, slots=True)
class BiasStack:
    """`SiteStack` of the gang's biases at one input group, for every row of the batch."""

    biases: dict[int, Tensor]  # by the site's position in the group

    def add_to(self, outputs_BTO: Sequence[Tensor], x_BTI: Tensor) -> Kept:
        for position, bias_O in self.biases.items():
            outputs_BTO[position].add_(bias_O)
        return ()

    def backward(self, x_BTI: Tensor, kept: Kept, grads_BTO: Sequence[Tensor], dx_BTI: Tensor | None) -> None:
        """A bias has no part in dx."""


@dataclass(frozen=True, slots=True)
class TapStack:
    """`SiteStack` of one cohort's merged adapters at one input group."""

    rows: CohortRows
    positions: tuple[int, ...]
    sites: tuple[Site, ...]
    members: tuple[MergedAdapter, ...]
    taps: GroupTaps

    def add_to(self, outputs_BTO: Sequence[Tensor], x_BTI: Tensor) -> Kept:
        return ()

    def backward(self, x_BTI: Tensor, kept: Kept, grads_BTO: Sequence[Tensor], dx_BTI: Tensor | None) -> None:
        x_SMI = self.rows.of(x_BTI)
        grads_SMO = {
            site.index: self.rows.of(grads_BTO[position])
            for site, position in zip(self.sites, self.positions, strict=True)
        }
        self.taps.emit(x_SMI, grads_SMO, lambda: self._gradients(x_SMI, grads_SMO))

    def _gradients(self, x_SMI: Tensor, grads_SMO: Mapping[int, Tensor]) -> dict[TensorKey, Tensor]:
        """By each member's own mathematics, with its factors taken from host memory for the moment."""
        gradients: dict[TensorKey, Tensor] = {}
        for index, grad_SMO in grads_SMO.items():
            of_members = [
                member.sites[index].gradient(x_MI, grad_MO, _weights(member, index, grad_MO))
                for member, x_MI, grad_MO in zip(self.members, x_SMI, grad_SMO, strict=True)
            ]
            for key in of_members[0]:
                stacked = torch.stack([of_member[key] for of_member in of_members])
                gradients[key.gradient] = stacked.to(self.taps.dtype)
        return gradients


def _weights(member: MergedAdapter, index: int, like: Tensor) -> dict[TensorKey, Tensor]:
    return {key: weight.to(like, non_blocking=True) for key, weight in member.weights[index].items()}
