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
from statistics import median
from typing import Protocol

import torch
from torch import Tensor

from cola_runtime.base_model.whole_tiles import whole_tiles
from cola_runtime.base_model.workspace import Workspace

_mkldnn = torch.ops.mkldnn
TILED_FOR_TOKENS = 512  # what the layout is chosen for; it serves any number
FEW_ROWS = 64  # of x: a short row alone, or two
_TRIAL_FEW, _TRIAL_MANY = 32, 256  # tokens
_TRIAL_SIZE = 1024  # inputs and outputs
_TRIAL_WEIGHTS = 8  # more than a core's own cache keeps
_TRIAL_ROUNDS = 7


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


class TiledForFewRows:
    """With tiles for at most FEW_ROWS rows, which laying the weight out costs as much as their product;
    reads it where it lies for more. As much memory as `TiledProduct`.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, widths: list[int]):
        self.widths = widths
        self._few, self._many = (kind(weight_OI, bias_O, widths) for kind in (TiledProduct, PlainProduct))

    def project(self, x_NI: Tensor, space: Workspace, name: str) -> Tensor:
        return self._for(x_NI).project(x_NI, space, name)

    def add_projected(self, base_NO: Tensor, x_NI: Tensor, space: Workspace, name: str) -> Tensor:
        return self._for(x_NI).add_projected(base_NO, x_NI, space, name)

    def gradient(self, grad_NO: Tensor, space: Workspace, name: str) -> Tensor:
        return self._for(grad_NO).gradient(grad_NO, space, name)

    def add_gradient(self, so_far_NI: Tensor, grad_NO: Tensor) -> Tensor:
        return self._for(grad_NO).add_gradient(so_far_NI, grad_NO)

    def _for(self, rows: Tensor) -> FrozenProduct:
        return self._few if len(rows) <= FEW_ROWS else self._many


ProductKind = type[PlainProduct] | type[CompiledProduct] | type[TiledForFewRows]


def fastest_product(weight_OI: Tensor, *, keep_tiles: bool) -> ProductKind:
    """What makes such a weight's products fastest on this machine, by a short trial, once in a process.

    Tiles are for bfloat16 alone, whose weights merging may not change.
    """
    if weight_OI.device.type != "cpu" or not hasattr(_mkldnn, "_linear_pointwise"):
        return PlainProduct
    if weight_OI.dtype == torch.float32 and _is_faster(CompiledProduct, torch.float32, _TRIAL_MANY):
        return CompiledProduct
    if weight_OI.dtype != torch.bfloat16 or not keep_tiles:
        return PlainProduct
    if _is_faster(TiledProduct, torch.bfloat16, _TRIAL_MANY):
        return TiledProduct
    few = _is_faster(TiledProduct, torch.bfloat16, _TRIAL_FEW, share=FASTER_FOR_FEW)
    return TiledForFewRows if few else PlainProduct


CLEARLY_FASTER = 0.85
"""Of a plain product's time. In float32 last bits depend on the choice, which the next start should make
again; kept tiles take twice their weight's memory, for nothing where they save a tenth of a product.
"""
FASTER_FOR_FEW = 0.9
"""The same for few rows, where all that a step of one short row saves is worth the memory: on a processor
where trials find 0.77 to 0.86, it takes a ninth less time (docs/performance.md).
"""


@cache
def _is_faster(kind: ProductKind, dtype: torch.dtype, tokens: int, *, share: float = CLEARLY_FASTER) -> bool:
    """With weights of one size, whatever the model's: every process on a machine should find the same."""
    weights_OI = [torch.ones(_TRIAL_SIZE, _TRIAL_SIZE, dtype=dtype) for _ in range(_TRIAL_WEIGHTS)]
    x_NI = torch.ones(tokens, _TRIAL_SIZE, dtype=dtype)
    sides = [[make(w, None, [len(w)]) for w in weights_OI] for make in (PlainProduct, kind)]
    space = Workspace()
    # In turns, since a neighbour may come or go. The middle round: the first compiles, the best is luck.
    rounds = [[_seconds(side, x_NI, space) for side in sides] for _ in range(_TRIAL_ROUNDS)]
    return median(other / plain for plain, other in rounds) < share


def _seconds(products: Sequence[FrozenProduct], x_NI: Tensor, space: Workspace) -> float:
    """One product with each of the weights, there and back."""
    started = time.perf_counter()
    for product in products:
        product.gradient(product.project(x_NI, space, "trial.y"), space, "trial.g")
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
