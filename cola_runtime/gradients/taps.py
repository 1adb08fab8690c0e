"""What a base step hands out while its backward pass runs, in the encodings that know no adapter kind.

Shapes: N rows, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cola_runtime.adapters.features import outer
from cola_runtime.types import Site, TensorKey, TensorKind


@dataclass(frozen=True, slots=True)
class Tap:
    """One input group's tensors for one segment, contiguous and never overwritten by the base model."""

    segment: int  # position in BaseStep.segments
    tensors: dict[TensorKey, Tensor]


TapSink = Callable[[Tap], None]
"""Called on the compute thread during the backward pass, deepest layer first; must not block."""


def activation_tensors(x_NI: Tensor, grads: Mapping[int, Tensor]) -> dict[TensorKey, Tensor]:
    """x under the first site, g [N, O] under each of `grads`' sites; only rows where any g is not zero.

    A row with g = 0 adds nothing to any gradient, so dropping it is exact. Zero is tested on g itself: a mask
    would keep rows that reach no loss. The tensors are copies; ids (an embedding's x, [N, 1]) are int32.
    """
    rows = _any_nonzero(list(grads.values())).nonzero().squeeze(1)
    used_NI = x_NI.index_select(0, rows)
    if not used_NI.is_floating_point():
        used_NI = used_NI.int()
    tensors = {TensorKey(next(iter(grads)), TensorKind.INPUT): used_NI}
    for site, grad_NO in grads.items():
        tensors[TensorKey(site, TensorKind.OUTPUT_GRADIENT)] = grad_NO.index_select(0, rows)
    return tensors


def _any_nonzero(grads: Sequence[Tensor]) -> Tensor:
    used_N = (grads[0] != 0).any(dim=1)
    for grad_NO in grads[1:]:
        used_N = used_N | (grad_NO != 0).any(dim=1)
    return used_N


def product_tensors(
    x_NI: Tensor, grads: Mapping[int, Tensor], site: Site, dtype: torch.dtype
) -> dict[TensorKey, Tensor]:
    """g^T [x, 1] of every site in `grads`, [O, I + 1]: all that a kind linear in x needs, whatever N.

    `site` is any of them. The product is whole at grouped convolutions, too.
    """
    return {
        TensorKey(index, TensorKind.WEIGHT_GRADIENT): _product(x_NI, grad_NO, site).to(dtype)
        for index, grad_NO in grads.items()
    }


def _product(x_NI: Tensor, grad_NO: Tensor, site: Site) -> Tensor:
    product = grad_NO.new_empty(grad_NO.shape[1], site.in_features + 1)
    if site.takes_ids:
        product[:, :-1] = outer(grad_NO, x_NI, site)
    else:
        torch.mm(grad_NO.T, x_NI, out=product[:, :-1])
    torch.sum(grad_NO, dim=0, out=product[:, -1])
    return product
