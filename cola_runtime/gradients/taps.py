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


def activation_tensors(
    x_NI: Tensor, grads: Mapping[int, Tensor], rows_K: Tensor | None
) -> dict[TensorKey, Tensor]:
    """Copies of `rows_K` alone: x under the first site, g [N, O] under each of `grads`' sites.

    Ids (an embedding's x, [N, 1]) are int32. None is all rows, as they are.
    """
    used_KI = _rows(x_NI, rows_K)
    if not used_KI.is_floating_point():
        used_KI = used_KI.int()
    tensors = {TensorKey(next(iter(grads)), TensorKind.INPUT): used_KI}
    for site, grad_NO in grads.items():
        tensors[TensorKey(site, TensorKind.OUTPUT_GRADIENT)] = _rows(grad_NO, rows_K)
    return tensors


def _rows(tensor_NF: Tensor, rows_K: Tensor | None) -> Tensor:
    return tensor_NF if rows_K is None else tensor_NF.index_select(0, rows_K)


def used_rows(grads_SNO: Sequence[Tensor]) -> list[Tensor]:
    """Of each of S segments the rows [K] where any g is not zero, ascending.

    A row with g = 0 adds nothing to any gradient, so dropping it is exact. Zero is tested on g itself: a mask
    would keep rows that reach no loss. Nearly every used row shows in its first column: the others are read
    whole.
    """
    used_SN = grads_SNO[0][..., 0] != 0
    for grad_SNO in grads_SNO[1:]:
        used_SN |= grad_SNO[..., 0] != 0
    silent = (~used_SN).nonzero(as_tuple=True)
    used_SN[silent] = torch.stack([(grad_SNO[silent] != 0).any(dim=1) for grad_SNO in grads_SNO]).any(dim=0)
    return [used_N.nonzero().squeeze(1) for used_N in used_SN]


def any_used(grads_SNO: Sequence[Tensor]) -> Tensor:
    """[S, N], whether any g of the row is not zero: `used_rows` for one who can wait for no answer."""
    used_SN = (grads_SNO[0] != 0).any(dim=-1)
    for grad_SNO in grads_SNO[1:]:
        used_SN |= (grad_SNO != 0).any(dim=-1)
    return used_SN


def product_tensors(
    x_NI: Tensor, grads: Mapping[int, Tensor], site: Site, dtype: torch.dtype
) -> dict[TensorKey, Tensor]:
    """g^T [x, 1] of every site in `grads`, [O, I + 1]: all that a kind linear in x needs, whatever N.

    `site` is any of them. The product is whole at grouped convolutions, too. Leading dimensions are batched.
    """
    return {
        TensorKey(index, TensorKind.WEIGHT_GRADIENT): _product(x_NI, grad_NO, site).to(dtype)
        for index, grad_NO in grads.items()
    }


def _product(x_NI: Tensor, grad_NO: Tensor, site: Site) -> Tensor:
    product = grad_NO.new_empty(*grad_NO.shape[:-2], grad_NO.shape[-1], site.in_features + 1)
    if site.takes_ids:
        product[..., :-1] = outer(grad_NO, x_NI, site)
    else:
        torch.matmul(grad_NO.mT, x_NI, out=product[..., :-1])
    torch.sum(grad_NO, dim=-2, out=product[..., -1])
    return product
