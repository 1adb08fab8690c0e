"""Taps any transformers model: one autograd function per input group, patched into its modules.

The first sibling's call (q of q, k, v) computes the whole group, the others take what it left.
Base weights never get gradients, and nothing below the lowest adapted site has a graph.
Shapes: B rows, T tokens, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

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


class _GroupTap:
    """The forward of one group's modules: computes all siblings at the first one's call."""

    def __init__(self, owner: TappedModules, group: SiteGroup) -> None:
        self._owner = owner
        self._group = group
        self._number = group.sites[0].input_group
        self._x: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}  # sibling -> its output for x
        for position, module in enumerate(group.modules):
            module.forward = self._forward_of(position)

    def forget(self) -> None:
        self._x, self._waiting = None, {}

    def _forward_of(self, position: int) -> Any:
        original = self._group.modules[position].forward

        def forward(x: Tensor) -> Tensor:
            stacks = self._owner.stacks(self._number)
            return self._output(position, x, stacks) if stacks else original(x)

        return forward

    def _output(self, position: int, x: Tensor, stacks: list[SiteStack]) -> Tensor:
        if x is not self._x or position not in self._waiting:
            arranged = self._group.arranged(x, self._owner.rows)
            self._x, self._waiting = x, dict(enumerate(self._compute(arranged, stacks)))
        output_BTO = self._waiting.pop(position)
        if not self._waiting:
            self.forget()
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


class _GroupProduct(torch.autograd.Function):
    """y_j = W_j x + b_j + s a_j(x) for the sites j of one group; backward hands out the taps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, group: SiteGroup, stacks: Any) -> tuple[Tensor, ...]:
        x = x.contiguous()
        outputs, kept = _adapted_outputs(group, stacks, x)
        ctx.group, ctx.stacks, ctx.kept = group, stacks, kept
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(True)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads_BTO: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        group, features = ctx.group, ctx.group.features(x)
        grads = [grad.contiguous() for grad in grads_BTO]
        dx = group.input_gradient(grads, x) if ctx.needs_input_grad[0] else None
        dfeatures = None if dx is None else group.feature_gradient(dx, features)
        for stack, kept in zip(ctx.stacks, ctx.kept, strict=True):
            stack.backward(features, kept, grads, dfeatures)
        return None if dx is None else group.with_adapters(dx, dfeatures), None, None, None
