"""A task's head: logits = W p + b, the linear kind's mathematics with a draw of its own.

Shapes: N pooled rows, I hidden size, O labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cola_runtime.adapter_spec import HeadKind, LinearKind
from cola_runtime.adapters.draws import normal
from cola_runtime.adapters.linear import SiteLinear
from cola_runtime.adapters.site_adapter import Gradients, Weights
from cola_runtime.types import Site, TensorKey, TensorKind

INITIAL_DEVIATION = 0.02  # transformers' initializer_range for a new head


class SiteHead:
    """`SiteAdapter` of one head. Not a `LinearSiteAdapter`: there is no weight that it could merge into."""

    def __init__(self, kind: HeadKind, site: Site) -> None:
        self.site = site
        self._shape = (kind.labels, site.in_features)
        self._linear = SiteLinear(LinearKind(bias=True), site)

    def initial_weights(self, seed: int) -> dict[TensorKey, Tensor]:
        """WEIGHT is drawn from (seed, site name), BIAS is zero."""
        weight = normal(f"{seed}/{self.site.name}", self._shape, deviation=INITIAL_DEVIATION)
        bias = torch.zeros(self._shape[0], dtype=torch.float64)
        return {
            TensorKey(self.site.index, TensorKind.WEIGHT): weight,
            TensorKey(self.site.index, TensorKind.BIAS): bias,
        }

    def forward(self, x_NI: Tensor, weights: Weights) -> Tensor:
        return self._linear.forward(x_NI, weights)

    def gradient(self, x_NI: Tensor, grad_NO: Tensor, weights: Weights) -> Gradients:
        return self._linear.gradient(x_NI, grad_NO, weights)
