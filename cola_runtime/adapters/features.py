"""Products with a site's input x, whatever its site kind holds it as; leading dimensions are batched.

x is [M, I]; at an embedding ids [M, 1], which stand for one-hot rows, so that x W^T gathers columns of W and
g^T x scatters. At a convolution x is its patches, of which group j sees the j-th run of features.
Shapes: M rows, I in_features, O out_features, K rows of a weight over x, R rank, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cola_runtime.types import Site


def times(x_MI: Tensor, weight_KI: Tensor, groups: int = 1) -> Tensor:
    """x W^T, [M, K]; of W [K, I / groups] group by group. Differentiable."""
    if not x_MI.is_floating_point():
        index_KM = _columns(x_MI).expand(*weight_KI.shape[:-1], -1)
        return weight_KI.gather(-1, index_KM).transpose(-1, -2)
    if groups == 1:
        return _product(x_MI, weight_KI.transpose(-1, -2))
    return _joined(_runs(x_MI, groups) @ _blocks(weight_KI, groups).transpose(-1, -2))


def outer(grad_MK: Tensor, x_MI: Tensor, site: Site, groups: int = 1) -> Tensor:
    """g^T x, [K, I], or [K, I / groups] of each group with itself. A new tensor."""
    if site.takes_ids:
        grad_KM = grad_MK.transpose(-1, -2)
        sums_KI = grad_MK.new_zeros(*grad_KM.shape[:-1], site.in_features)
        return sums_KI.scatter_add_(-1, _columns(x_MI).expand(grad_KM.shape), grad_KM)
    if groups == 1:
        return _product(grad_MK.transpose(-1, -2), x_MI)
    return (_runs(grad_MK, groups).transpose(-1, -2) @ _runs(x_MI, groups)).flatten(-3, -2)


def back(grad_MO: Tensor, weight_OI: Tensor, groups: int) -> Tensor:
    """g W, [M, I], of W [O, I / groups]."""
    return _joined(_runs(grad_MO, groups) @ _blocks(weight_OI, groups))


def input_matrix(weight: Tensor, site: Site) -> Tensor:
    """A weight over x, [K, ...] in the site's own shape, as [K, I]; a view."""
    return weight if site.patch is None else weight.flatten(1)


def input_weight(matrix_KI: Tensor, site: Site) -> Tensor:
    """The gradient of a weight over x in the site's own shape; an embedding's padding gets none, in place."""
    if site.padding_index is not None:
        matrix_KI[..., site.padding_index] = 0.0
    return matrix_KI if site.patch is None else divided(matrix_KI, -1, -1, *site.patch.kernel)


def output_matrix(factor: Tensor, site: Site) -> Tensor:
    """B as [O, R]. At a grouped convolution, where B is [O, R / groups, 1, 1], with zeros outside its blocks:
    outputs of group j see the j-th run of the R rows of A, which all see every channel, as in PEFT.
    """
    if site.patch is None:
        return factor
    blocks_OK = factor.flatten(1)
    return blocks_OK if site.groups == 1 else _block_diagonal(blocks_OK.chunk(site.groups))


def output_weight(matrix_OR: Tensor, site: Site) -> Tensor:
    """The gradient of B in its own shape, from that of `output_matrix`."""
    return matrix_OR if site.patch is None else diagonal_blocks(matrix_OR, site.groups)[..., None, None]


def diagonal_blocks(matrix_OI: Tensor, groups: int) -> Tensor:
    """[O, I / groups]: of each group's outputs the columns of the same group."""
    if groups == 1:
        return matrix_OI
    blocks = divided(divided(matrix_OI, -2, groups, -1), -1, groups, -1)
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).flatten(-3, -2)


def divided(tensor: Tensor, dimension: int, *sizes: int) -> Tensor:
    """The dimension as several of these sizes; a view."""
    view: Tensor = tensor.unflatten(dimension, sizes)  # type: ignore[no-untyped-call]
    return view


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, without what `@` asks first where it is known how the batches lie."""
    return torch.bmm(left, right) if left.ndim == right.ndim == 3 else left @ right


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    matrix: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return matrix


def _columns(ids_M1: Tensor) -> Tensor:
    """[1, M], for gather and scatter along the last dimension."""
    return ids_M1.long().transpose(-1, -2)


def _runs(rows_MF: Tensor, groups: int) -> Tensor:
    """[G, M, F / groups]."""
    return divided(rows_MF, -1, groups, -1).transpose(-2, -3)


def _blocks(weight_KI: Tensor, groups: int) -> Tensor:
    """[G, K / groups, I / groups]."""
    return divided(weight_KI, -2, groups, -1)


def _joined(runs_GMF: Tensor) -> Tensor:
    """Inverse of `_runs`."""
    return runs_GMF.transpose(-2, -3).flatten(-2)
