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
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from cola_runtime.base_model.quantized import QuantizedLinear
from cola_runtime.base_model.stacks.cache import Stacks
from cola_runtime.base_model.stacks.protocol import Kept, SiteStack
from cola_runtime.types import Site, SiteKind


class SiteGroup:
    """The modules that share one input, with the products of their frozen weights."""

    def __init__(self, sites: Sequence[Site], modules: Sequence[nn.Module]) -> None:
        self.sites = tuple(sites)
        self.modules = tuple(modules)
        self.fused_weight: Tensor | None = None  # [sum O, I]; the modules' weights are views of it
        self.fused_bias: Tensor | None = None
        self.widths = [site.out_features for site in sites]
        self.spans_layers = False  # some of its sites' layers are computed again without the others'

    def fuse(self) -> None:
        """Move the weights of several plain Linear sites into one buffer. Each keeps its own as a view."""
        if len(self.modules) < 2 or any(type(module) is not nn.Linear for module in self.modules):
            return
        biases = [module.bias for module in self.modules]
        if any(bias is None for bias in biases) and not all(bias is None for bias in biases):
            return
        self.fused_weight = _share_buffer([module.weight for module in self.modules])
        if biases[0] is not None:
            self.fused_bias = _share_buffer(biases)

    def base_outputs(self, x_BTI: Tensor) -> list[Tensor]:
        """f(x) of every site, [B, T, O]; fused sites are column slices of one tensor."""
        if self.fused_weight is not None:
            fused = functional.linear(x_BTI, self.fused_weight, self.fused_bias)
            return list(torch.split(fused, self.widths, dim=-1))
        return [type(module).forward(module, x_BTI) for module in self.modules]

    def input_gradient(self, grads_BTO: Sequence[Tensor]) -> Tensor:
        """Sum over the sites of g W, [B, T, I]."""
        if self.fused_weight is not None:
            return torch.cat(list(grads_BTO), dim=-1) @ self.fused_weight
        products = [
            grad @ weight_OI(module, site)
            for grad, module, site in zip(grads_BTO, self.modules, self.sites, strict=True)
        ]
        return sum(products[1:], start=products[0])


def weight_OI(module: nn.Module, site: Site) -> Tensor:
    """The site's weight as [out, in], whichever way it is stored; a view, unless it is quantised."""
    if isinstance(module, QuantizedLinear):
        return module.weight
    parameter: Any = module.weight
    weight: Tensor = parameter.detach()
    return weight if site.kind is SiteKind.LINEAR else weight.t()


def _share_buffer(parameters: Sequence[Any]) -> Tensor:
    fused = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, torch.split(fused, [len(p) for p in parameters]), strict=True):
        parameter.data = part
    return fused


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
            # Some models flatten rows and tokens into one dimension: adapters are slices of rows.
            x_BTI = x.reshape(self._owner.rows, -1, x.shape[-1])
            outputs_BTO = self._compute(x_BTI, stacks)
            self._x, self._waiting = x, dict(enumerate(outputs_BTO))
            if self._group.spans_layers and self._owner.training:
                self._spanning = _Spanning(x, position, outputs_BTO)
        output_BTO = self._waiting.pop(position)
        if not self._waiting:
            self._x = None
        return output_BTO.view(*x.shape[:-1], -1)

    def _compute(self, x_BTI: Tensor, stacks: list[SiteStack]) -> Sequence[Tensor]:
        if not self._owner.training:
            return _adapted_outputs(self._group, stacks, x_BTI.contiguous())[0]
        # Makes the outputs part of the graph even where x is not: at the lowest site.
        anchor = x_BTI.new_zeros((), requires_grad=True)
        outputs: Sequence[Tensor] = _GroupProduct.apply(x_BTI, anchor, self._group, stacks)  # type: ignore[no-untyped-call]
        return outputs


def _adapted_outputs(
    group: SiteGroup, stacks: Sequence[SiteStack], x_BTI: Tensor
) -> tuple[list[Tensor], list[Kept]]:
    outputs = group.base_outputs(x_BTI)
    return outputs, [stack.add_to(outputs, x_BTI) for stack in stacks]


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


class _GroupProduct(torch.autograd.Function):
    """y_j = W_j x + b_j + s a_j(x) for the sites j of one group; backward hands out the taps."""

    @staticmethod
    def forward(
        ctx: Any, x_BTI: Tensor, _anchor: Tensor, group: SiteGroup, stacks: Any
    ) -> tuple[Tensor, ...]:
        x_BTI = x_BTI.contiguous()
        # What an adapter differentiates within its own forward is no part of a layer that is computed again.
        with saved_tensors_hooks(_unchanged, _unchanged):
            outputs, kept = _adapted_outputs(group, stacks, x_BTI)
        ctx.group, ctx.stacks, ctx.kept_counts = group, stacks, [len(each) for each in kept]
        # All of it this way: what lay on ctx itself would outlive a layer that is to be computed again.
        ctx.save_for_backward(x_BTI, *(tensor for each in kept for tensor in each))
        ctx.set_materialize_grads(True)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads_BTO: Tensor) -> tuple[Tensor | None, None, None, None]:
        x_BTI, *kept = ctx.saved_tensors
        grads = [grad.contiguous() for grad in grads_BTO]
        dx_BTI = ctx.group.input_gradient(grads) if ctx.needs_input_grad[0] else None
        for stack, count in zip(ctx.stacks, ctx.kept_counts, strict=True):
            stack.backward(x_BTI, tuple(kept[:count]), grads, dx_BTI)
            del kept[:count]
        return dx_BTI, None, None, None
