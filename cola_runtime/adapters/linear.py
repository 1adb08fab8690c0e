"""The full-rank adapter at one site: h = f(x) + s * (W x + b).

Shapes: N rows, I in_features, O out_features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cola_runtime.adapter_spec import LinearKind
from cola_runtime.adapters.features import diagonal_blocks, input_matrix, input_weight, outer, times
from cola_runtime.adapters.shapes import site_weight_shapes
from cola_runtime.adapters.site_adapter import Gradients, Weights
from cola_runtime.types import Site, TensorKey, TensorKind


class SiteLinear:
    """`LinearSiteAdapter` of one full-rank adapter: WEIGHT [O, I] and, if it has one, BIAS [O].

    At a convolution WEIGHT has its weight's shape. Shapes below: I of one group where there are several.
    """

    def __init__(self, kind: LinearKind, site: Site) -> None:
        self.site = site
        self._kind = kind
        self._weight = TensorKey(site.index, TensorKind.WEIGHT)
        self._bias = TensorKey(site.index, TensorKind.BIAS)

    def initial_weights(self, seed: int) -> dict[TensorKey, Tensor]:
        """Zero, whatever the seed."""
        shapes = site_weight_shapes(self._kind, self.site)
        return {key: torch.zeros(shape, dtype=torch.float64) for key, shape in shapes.items()}

    def forward(self, x_NI: Tensor, weights: Weights) -> Tensor:
        output_NO = times(x_NI, self._matrix(weights), self.site.groups)
        if self._kind.bias:
            output_NO = output_NO + weights[self._bias]
        return self._kind.scaling * output_NO

    def gradient(self, x_NI: Tensor, grad_NO: Tensor, weights: Weights) -> Gradients:
        return self._gradients(outer(grad_NO, x_NI, self.site, self.site.groups), grad_NO.sum(dim=0))

    def gradient_of_product(self, product_OI: Tensor, grad_sum_O: Tensor, weights: Weights) -> Gradients:
        """dW = s G, db = s times the sum of g."""
        return self._gradients(diagonal_blocks(product_OI, self.site.groups), grad_sum_O)

    def _gradients(self, product_OI: Tensor, grad_sum_O: Tensor) -> Gradients:
        gradients = {self._weight: input_weight(self._kind.scaling * product_OI, self.site)}
        if self._kind.bias:
            gradients[self._bias] = self._kind.scaling * grad_sum_O
        return gradients

    def add_delta_weight(self, weight_OI: Tensor, weights: Weights, factor: float) -> None:
        weight_OI.add_(self._matrix(weights), alpha=factor * self._kind.scaling)

    def delta_bias(self, weights: Weights) -> Tensor | None:
        return self._kind.scaling * weights[self._bias] if self._kind.bias else None

    def _matrix(self, weights: Weights) -> Tensor:
        return input_matrix(weights[self._weight], self.site)
