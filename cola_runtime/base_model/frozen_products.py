"""The matrix products of frozen weights, plain or with weights laid out once for the processor.

On a CPU a bfloat16 product first lays its weight out in tiles, each time, which costs about as much as the
product of a few hundred tokens (docs/performance.md). A frozen weight can keep the tiles, one copy for each
direction.
Shapes: N rows x tokens, I in_features, O out_features.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cola_runtime.base_model.whole_tiles import whole_tiles
from cola_runtime.base_model.workspace import Workspace

_mkldnn = torch.ops.mkldnn
TILED_FOR_TOKENS = 512  # what the layout is chosen for; it serves any number
_TRIAL_TOKENS = 256
_TRIAL_WEIGHTS = 8
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


class TiledProduct:
    """Keeps the weight in oneDNN's layout for each direction: twice its memory beside the weight itself.

    The weight must not change.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, widths: list[int]):
        self.widths = widths
        self._bias_O = bias_O
        self._forward = _tiles(weight_OI)
        self._backward = _tiles(weight_OI.t())

    def project(self, x_NI: Tensor, space: Workspace, name: str) -> Tensor:
        return _product(x_NI, self._forward, self._bias_O)

    def add_projected(self, base_NO: Tensor, x_NI: Tensor, space: Workspace, name: str) -> Tensor:
        out_NO = _sum(base_NO, x_NI, self._forward)
        return out_NO if self._bias_O is None else out_NO.add_(self._bias_O)

    def gradient(self, grad_NO: Tensor, space: Workspace, name: str) -> Tensor:
        return _product(grad_NO, self._backward, None)

    def add_gradient(self, so_far_NI: Tensor, grad_NO: Tensor) -> Tensor:
        return _sum(so_far_NI, grad_NO, self._backward)


def tiles_pay(weight_OI: Tensor) -> bool:
    """Whether kept tiles make such a weight's products faster on this machine, by a short trial.

    Never in another dtype: a bfloat16 weight is the one that merging may not change.
    """
    if (
        weight_OI.dtype != torch.bfloat16
        or weight_OI.device.type != "cpu"
        or not hasattr(_mkldnn, "_reorder_linear_weight")
    ):
        return False
    weights_OI = [weight_OI.clone() for _ in range(_TRIAL_WEIGHTS)]  # more than a cache keeps of them
    x_NI = weight_OI.new_ones(_TRIAL_TOKENS, weight_OI.shape[1])
    seconds = {kind: _best_seconds([kind(w, None, [len(w)]) for w in weights_OI], x_NI) for kind in _KINDS}
    return seconds[TiledProduct] < seconds[PlainProduct]


_KINDS: tuple[type[PlainProduct] | type[TiledProduct], ...] = (PlainProduct, TiledProduct)


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


def _product(x_NI: Tensor, tiles: Tensor, bias_O: Tensor | None) -> Tensor:
    (whole_NI,) = whole_tiles(x_NI)
    out: Tensor = _mkldnn._linear_pointwise(whole_NI, tiles, bias_O, "none", [], "")
    return out[: len(x_NI)]


def _sum(base_NO: Tensor, x_NI: Tensor, tiles: Tensor) -> Tensor:
    whole_NI, whole_NO = whole_tiles(x_NI, base_NO)
    out: Tensor = _mkldnn._linear_pointwise.binary(whole_NI, whole_NO, tiles, None, "add")
    return out[: len(x_NI)]
