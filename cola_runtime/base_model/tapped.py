"""Taps any transformers model: one autograd function per input group, patched into its modules.

The first sibling's call (q of q, k, v) computes the whole group, the others take what it left.
Base weights never get gradients, and nothing below the lowest adapted site has a graph.
Shapes: B rows, T tokens, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from cola_runtime.base_model.site_groups import SiteGroup
from cola_runtime.base_model.stacks.cohorts import Stacks
from cola_runtime.base_model.stacks.protocol import Kept, SiteStack


class TappedModules:
    """Patches the sites' modules in place. Without an active step they compute exactly as before."""

    def __init__(self, groups: Sequence[SiteGroup]) -> None:
        self._stacks: Stacks = {}
        self._rows = 0
        self._training = False
        self._taps = [_GroupTap(self, group) for group in groups]

    def stacks(self, group: int) -> list[SiteStack]:
        return self._stacks.get(group, [])

    @property
    def rows(self) -> int:
        return self._rows

    @property
    def training(self) -> bool:
        return self._training

    @contextmanager
    def active(self, stacks: Stacks, *, rows: int, training: bool) -> Iterator[None]:
        """Within, the modules compute a batch of `rows` with these adapters; afterwards nothing of the step
        is referenced.
        """
        self._stacks, self._rows, self._training = stacks, rows, training
        try:
            yield
        finally:
            self._stacks, self._training = {}, False
            for tap in self._taps:
                tap.forget()


@dataclass(frozen=True, slots=True)
class _Spanning:
    """What one layer computed for others, which are computed again before it is."""

    x: Tensor
    computed_at: int  # the sibling whose layer computes all outputs, also the second time
    outputs_BTO: Sequence[Tensor]

    def has(self, position: int, x: Tensor) -> bool:
        """Not by identity: a layer that is computed again gets its arguments as new values."""
        same = x.data_ptr() == self.x.data_ptr() and x.shape == self.x.shape
        return same and position != self.computed_at


class _GroupTap:
    """The forward of one group's modules: computes all siblings at the first one's call."""

    def __init__(self, owner: TappedModules, group: SiteGroup) -> None:
        self._owner = owner
        self._group = group
        self._number = group.sites[0].input_group
        self._x: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}  # sibling -> its output for x
        self._spanning: _Spanning | None = None
        for position, module in enumerate(group.modules):
            module.forward = self._forward_of(position)

    def forget(self) -> None:
        self._x, self._waiting = None, {}
        self._spanning = None

    def _forward_of(self, position: int) -> Any:
        original = self._group.modules[position].forward

        def forward(x: Tensor) -> Tensor:
            stacks = self._owner.stacks(self._number)
            return self._output(position, x, stacks) if stacks else original(x)

        return forward

    def _output(self, position: int, x: Tensor, stacks: list[SiteStack]) -> Tensor:
        if self._spanning is not None and self._spanning.has(position, x):
            return self._spanning.outputs_BTO[position].view(*x.shape[:-1], -1)
        if x is not self._x or position not in self._waiting:
            arranged = self._group.arranged(x, self._owner.rows)
            outputs_BTO = self._compute(arranged, stacks)
            self._x, self._waiting = x, dict(enumerate(outputs_BTO))
            if self._group.spans_layers and self._owner.training:
                self._spanning = _Spanning(x, position, outputs_BTO)
        output_BTO = self._waiting.pop(position)
        if not self._waiting:
            self._x = None
        return self._group.output(output_BTO, x)

    def _compute(self, x: Tensor, stacks: list[SiteStack]) -> Sequence[Tensor]:
        """Outputs [B, T, O] for an arranged input."""
        if not self._owner.training:
            return _adapted_outputs(self._group, stacks, x.contiguous())[0]
        # Makes the outputs part of the graph even where x is not: at the lowest site.
        anchor = torch.zeros((), dtype=self._group.dtype, device=x.device, requires_grad=True)
        outputs: Sequence[Tensor] = _GroupProduct.apply(x, anchor, self._group, stacks)  # type: ignore[no-untyped-call]
        return outputs


def _adapted_outputs(
    group: SiteGroup, stacks: Sequence[SiteStack], x: Tensor
) -> tuple[list[Tensor], list[Kept]]:
    outputs, features = group.base_outputs(x), group.features(x)
    return outputs, [stack.add_to(outputs, features) for stack in stacks]


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


class _GroupProduct(torch.autograd.Function):
    """y_j = W_j x + b_j + s a_j(x) for the sites j of one group; backward hands out the taps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, group: SiteGroup, stacks: Any) -> tuple[Tensor, ...]:
        x = x.contiguous()
        # What an adapter differentiates within its own forward is no part of a layer that is computed again.
        with saved_tensors_hooks(_unchanged, _unchanged):
            outputs, kept = _adapted_outputs(group, stacks, x)
        ctx.group, ctx.stacks, ctx.kept_counts = group, stacks, [len(each) for each in kept]
        # All of it this way: what lay on ctx itself would outlive a layer that is to be computed again.
        ctx.save_for_backward(x, *(tensor for each in kept for tensor in each))
        ctx.set_materialize_grads(True)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads_BTO: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, *kept = ctx.saved_tensors
        group, features = ctx.group, ctx.group.features(x)
        grads = [grad.contiguous() for grad in grads_BTO]
        dx = group.input_gradient(grads, x) if ctx.needs_input_grad[0] else None
        dfeatures = None if dx is None else group.feature_gradient(dx, features)
        for stack, count in zip(ctx.stacks, ctx.kept_counts, strict=True):
            stack.backward(features, tuple(kept[:count]), grads, dfeatures)
            del kept[:count]
        return None if dx is None else group.with_adapters(dx, dfeatures), None, None, None
