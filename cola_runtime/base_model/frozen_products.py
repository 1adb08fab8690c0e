"""The matrix products of frozen weights: the BLAS library's, oneDNN's, or with weights laid out once for it.

On a CPU a bfloat16 product first lays its weight out in tiles, each time, which costs about as much as the
product of a few hundred tokens (docs/performance.md). A frozen weight can keep the tiles, one copy for each
direction. In float32 torch asks MKL, which on other makers' processors takes twice as long as oneDNN.
Shapes: N rows x tokens, I in_features, O out_features.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from cola_runtime.base_model.whole_tiles import whole_tiles
from cola_runtime.base_model.workspace import Workspace

_mkldnn = torch.ops.mkldnn
TILED_FOR_TOKENS = 512  # what the layout is chosen for; it serves any number
_TRIAL_TOKENS = 256
_TRIAL_SIZE = 1024  # inputs and outputs
_TRIAL_WEIGHTS = 8  # more than a cache keeps of them
_TRIAL_ROUNDS = 3


class FrozenProduct(Protocol):
    """x W^T + b and its transpose; what comes back is new, or lies in the named buffer of `space`."""

    widths: list[int]  # columns of each site

    def project(self, x_NI: Tensor, space: Workspace, name: str) -> Tensor:
        """x W^T + b."""

    def add_projected(self, base_NO: Tensor, x_NI: Tensor, space: Workspace, name: str) -> Tensor:
        """base + x W^T + b, the sum rounded once where there is no b."""

    def gradient(self, grad_NO: Tensor, space: Workspace, name: str) -> Tensor:
        """g W."""

    def add_gradient(self, so_far_NI: Tensor, grad_NO: Tensor) -> Tensor:
        """so_far + g W; `so_far` is given away."""


class PlainProduct:
    """Reads the weight where it lies."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, widths: list[int]):
        self.widths = widths
        self._weight_OI, self._bias_O = weight_OI, bias_O

    def project(self, x_NI: Tensor, space: Workspace, name: str) -> Tensor:
        out_NO = self._output(x_NI, space, name)
        if self._bias_O is None:
            return torch.mm(x_NI, self._weight_OI.t(), out=out_NO)
        return torch.addmm(self._bias_O, x_NI, self._weight_OI.t(), out=out_NO)

    def add_projected(self, base_NO: Tensor, x_NI: Tensor, space: Workspace, name: str) -> Tensor:
        out_NO = self._output(x_NI, space, name)
        torch.addmm(base_NO, x_NI, self._weight_OI.t(), out=out_NO)
        return out_NO if self._bias_O is None else out_NO.add_(self._bias_O)

    def gradient(self, grad_NO: Tensor, space: Workspace, name: str) -> Tensor:
        out_NI = space.tensor(name, (len(grad_NO), self._weight_OI.shape[1]), grad_NO.dtype)
        return torch.mm(grad_NO, self._weight_OI, out=out_NI)

    def add_gradient(self, so_far_NI: Tensor, grad_NO: Tensor) -> Tensor:
        return so_far_NI.addmm_(grad_NO, self._weight_OI)

    def _output(self, x_NI: Tensor, space: Workspace, name: str) -> Tensor:
        return space.tensor(name, (len(x_NI), len(self._weight_OI)), x_NI.dtype)


class CompiledProduct:
    """Reads the weight where it lies, too, but through oneDNN instead of the BLAS library."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, widths: list[int]):
        self.widths = widths
        self._bias_O = bias_O
        self._forward, self._backward = weight_OI, weight_OI.t()

    def project(self, x_NI: Tensor, space: Workspace, name: str) -> Tensor:
        return _product(x_NI, self._forward, self._bias_O)

    def add_projected(self, base_NO: Tensor, x_NI: Tensor, space: Workspace, name: str) -> Tensor:
        out_NO = _sum(base_NO, x_NI, self._forward)
        return out_NO if self._bias_O is None else out_NO.add_(self._bias_O)

    def gradient(self, grad_NO: Tensor, space: Workspace, name: str) -> Tensor:
        return _product(grad_NO, self._backward, None)

    def add_gradient(self, so_far_NI: Tensor, grad_NO: Tensor) -> Tensor:
        return _sum(so_far_NI, grad_NO, self._backward)


class TiledProduct(CompiledProduct):
    """Keeps the weight in oneDNN's layout for each direction: twice its memory beside the weight itself.

    The weight must not change.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, widths: list[int]):
        super().__init__(weight_OI, bias_O, widths)
        self._forward, self._backward = _tiles(weight_OI), _tiles(weight_OI.t())


ProductKind = type[PlainProduct] | type[CompiledProduct]
CLEARLY_FASTER = 0.8
"""Of a plain product's time. In float32 last bits depend on the choice, which the next start should make
again; kept tiles take twice their weight's memory, for nothing where they save a tenth of a product.
"""


def fastest_product(weight_OI: Tensor, *, keep_tiles: bool) -> ProductKind:
    """What makes such a weight's products fastest on this machine, by a short trial, once in a process.

    Tiles are for bfloat16 alone, whose weights merging may not change.
    """
    other = _OTHERS.get(weight_OI.dtype)
    if other is None or weight_OI.device.type != "cpu" or not hasattr(_mkldnn, "_linear_pointwise"):
        return PlainProduct
    if other is TiledProduct and not keep_tiles:
        return PlainProduct
    return other if _is_faster(weight_OI.dtype) else PlainProduct


_OTHERS: dict[torch.dtype, ProductKind] = {torch.bfloat16: TiledProduct, torch.float32: CompiledProduct}


@cache
def _is_faster(dtype: torch.dtype) -> bool:
    """With weights of one size, whatever the model's: every process on a machine should find the same."""
    other = _OTHERS[dtype]
    weights_OI = [torch.ones(_TRIAL_SIZE, _TRIAL_SIZE, dtype=dtype) for _ in range(_TRIAL_WEIGHTS)]
    x_NI = torch.ones(_TRIAL_TOKENS, _TRIAL_SIZE, dtype=dtype)
    plain, others = (
        _best_seconds([kind(w, None, [len(w)]) for w in weights_OI], x_NI) for kind in (PlainProduct, other)
    )
    return others < CLEARLY_FASTER * plain


def _best_seconds(products: Sequence[FrozenProduct], x_NI: Tensor) -> float:
    space = Workspace()
    return min(_timed(product, x_NI, space) for _ in range(_TRIAL_ROUNDS) for product in products)


def _timed(product: FrozenProduct, x_NI: Tensor, space: Workspace) -> float:
    started = time.perf_counter()
    product.project(x_NI, space, "trial")
    return time.perf_counter() - started


def _tiles(weight_OI: Tensor) -> Tensor:
    tiles: Tensor = _mkldnn._reorder_linear_weight(weight_OI.contiguous(), TILED_FOR_TOKENS)
    return tiles


def _product(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    (whole_NI,) = whole_tiles(x_NI)
    out: Tensor = _mkldnn._linear_pointwise(whole_NI, weight_OI, bias_O, "none", [], "")
    return out[: len(x_NI)]


def _sum(base_NO: Tensor, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    whole_NI, whole_NO = whole_tiles(x_NI, base_NO)
    out: Tensor = _mkldnn._linear_pointwise.binary(whole_NI, whole_NO, weight_OI, None, "add")
    return out[: len(x_NI)]
