"""The base weights with one gang's adapters in them: W = W0 + sum_k p_k delta_k, or W0 itself.

W is computed from the pristine W0 each time, never by adding and taking away, and written into the buffers
that the modules and the fused products share. What is in place stays until something else is asked for.
Shapes: I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from cola_runtime.adapters.site_modules import weight_OI
from cola_runtime.base_model.bank import MergedAdapter
from cola_runtime.base_model.site_groups import SiteGroup

Biases = dict[int, Tensor]
"""Site -> sum_k p_k b_k, [O]."""


class MergedWeights:
    """Owns what the sites' weights are. Belongs to the compute thread; changes between base steps only.

    Biases are not written into the modules, many of which have none: `biases` are added to the sites'
    outputs.
    """

    def __init__(self, groups: Sequence[SiteGroup]) -> None:
        self._weights_OI = {
            site.index: weight_OI(module, site)
            for group in groups
            for site, module in zip(group.sites, group.modules, strict=True)
        }
        self._pristine_OI: dict[int, Tensor] = {}  # of the sites that were ever changed and may be again
        self._changed: set[int] = set()  # sites whose weight is not W0 now
        self._members: tuple[MergedAdapter, ...] | None = ()  # in place; None: unknown, after a failure
        self.biases: Biases = {}

    @property
    def nbytes(self) -> int:
        """Of the pristine copies."""
        return sum(weight.nbytes for weight in self._pristine_OI.values())

    @torch.no_grad()
    def put(self, members: Sequence[MergedAdapter]) -> None:
        """Merge exactly these adapters, all of one gang; nobody: the pristine weights."""
        if self._members == tuple(members):
            return
        self._members = None
        sites = {index for member in members for index in member.sites}
        for index in self._changed - sites:
            self._restore(index)
        shares = _shares(members)
        self.biases = {}
        for index in sorted(sites):
            self._merge(index, shares)
        self._members = tuple(members)

    @torch.no_grad()
    def release(self, needed: Collection[int]) -> None:
        """Forget the pristine copies of all other sites; a site that is changed gets its own back first."""
        unneeded = self._pristine_OI.keys() - set(needed)
        if self._changed & unneeded:
            self.put(())
        for index in unneeded:
            del self._pristine_OI[index]

    def _merge(self, index: int, shares: Sequence[tuple[MergedAdapter, float]]) -> None:
        """Sums the deltas in the weight's own memory and adds W0 last: one rounding at W's scale."""
        target_OI = self._weights_OI[index]
        if index not in self._pristine_OI:
            self._pristine_OI[index] = target_OI.clone(memory_format=torch.preserve_format)
        self._changed.add(index)
        target_OI.zero_()
        for member, share in shares:
            if index in member.sites:
                self._add(index, member, share)
        target_OI.add_(self._pristine_OI[index])

    def _add(self, index: int, member: MergedAdapter, share: float) -> None:
        target_OI, adapter = self._weights_OI[index], member.sites[index]
        weights = {
            key: weight.to(target_OI, non_blocking=True) for key, weight in member.weights[index].items()
        }
        adapter.add_delta_weight(target_OI, weights, share)
        bias_O = adapter.delta_bias(weights)
        if bias_O is not None:
            total_O = self.biases.setdefault(index, torch.zeros_like(bias_O))
            total_O.add_(bias_O, alpha=share)

    def _restore(self, index: int) -> None:
        self._weights_OI[index].copy_(self._pristine_OI[index])
        self._changed.discard(index)


def _shares(members: Sequence[MergedAdapter]) -> list[tuple[MergedAdapter, float]]:
    """Each with its p: weight over the sum of all weights, or the weight itself."""
    mean = any(member.membership.gang.combine == "mean" for member in members)
    total = sum(member.membership.weight for member in members) if mean else 1.0
    return [(member, member.membership.weight / total) for member in members]
