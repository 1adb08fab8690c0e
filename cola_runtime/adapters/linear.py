"""The full-rank adapter at one site: h = f(x) + s * (W x + b).

Shapes: N rows, I in_features, O out_features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cola_runtime.adapter_spec import LinearKind
from cola_runtime.adapters.shapes import site_weight_shapes
from cola_runtime.adapters.site_adapter import Gradients, Weights
from cola_runtime.types import Site, TensorKey, TensorKind


class SiteLinear:
    """`LinearSiteAdapter` of one full-rank adapter: WEIGHT [O, I] and, if it has one, BIAS [O]."""

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
        bias_O = weights[self._bias] if self._kind.bias else None
        return self._kind.scaling * torch.nn.functional.linear(x_NI, weights[self._weight], bias_O)

    def gradient(self, x_NI: Tensor, grad_NO: Tensor, weights: Weights) -> Gradients:
        return self.gradient_of_product(grad_NO.T @ x_NI, grad_NO.sum(dim=0), weights)

    def gradient_of_product(self, product_OI: Tensor, grad_sum_O: Tensor, weights: Weights) -> Gradients:
        """dW = s G, db = s times the sum of g."""
        gradients = {self._weight: self._kind.scaling * product_OI}
        if self._kind.bias:
            gradients[self._bias] = self._kind.scaling * grad_sum_O
        return gradients

    def add_delta_weight(self, weight_OI: Tensor, weights: Weights, factor: float) -> None:
        weight_OI.add_(weights[self._weight], alpha=factor * self._kind.scaling)

    def delta_bias(self, weights: Weights) -> Tensor | None:
        return self._kind.scaling * weights[self._bias] if self._kind.bias else None
