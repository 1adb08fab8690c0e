"""What every adapter kind can do at one site. Weights are the whole adapter's; each takes its own keys.

Shapes: N rows, I in_features, O out_features. Gradients are keyed by the weight that they belong to and carry
the scaling s exactly once. All tensors share one dtype. Sums over rows: g carries the loss's normalisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from cola_runtime.types import Site, TensorKey

Weights = Mapping[TensorKey, Tensor]
Gradients = dict[TensorKey, Tensor]


class SiteAdapter(Protocol):
    """One kind at one site."""

    site: Site

    def initial_weights(self, seed: int) -> dict[TensorKey, Tensor]:
        """In float64, of (seed, kind, site name, site shape) alone; the adapter changes nothing yet."""

    def forward(self, x_NI: Tensor, weights: Weights) -> Tensor:
        """s * a(x), [N, O]; differentiable by autograd in x and the weights."""

    def gradient(self, x_NI: Tensor, grad_NO: Tensor, weights: Weights) -> Gradients:
        """The vector-Jacobian product of s * a(x) with g, by weight."""


@runtime_checkable
class LinearSiteAdapter(SiteAdapter, Protocol):
    """A kind that is linear in x: its gradient needs G = g^T x only, and it merges into the base weight."""

    def gradient_of_product(self, product_OI: Tensor, grad_sum_O: Tensor, weights: Weights) -> Gradients:
        """As `gradient`, from G = g^T x and the sum of g over rows."""

    def add_delta_weight(self, weight_OI: Tensor, weights: Weights, factor: float) -> None:
        """In place, without a temporary: weight += factor * s * delta. The bias is `delta_bias`."""

    def delta_bias(self, weights: Weights) -> Tensor | None:
        """s * bias [O], for a kind that has one."""
