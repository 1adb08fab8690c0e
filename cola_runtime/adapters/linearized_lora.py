"""Linearized LoRA at one site: h = f(x) + s * (dB A0 + B0 dA) x, the tangent of LoRA at (A0, B0).

Partial linearization (ICLR 2024): linear in its weights too, so adapters of one base_seed add exactly and a
gradient does not depend on the current deltas. Shapes: N rows, I in_features, O out_features, R rank.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from cola_runtime.adapter_spec import LinearizedLoraKind
from cola_runtime.adapters.features import (
    input_matrix,
    input_weight,
    outer,
    output_matrix,
    output_weight,
    times,
)
from cola_runtime.adapters.linearized_base import base_a, base_b
from cola_runtime.adapters.shapes import site_weight_shapes
from cola_runtime.adapters.site_adapter import Gradients, Weights
from cola_runtime.types import Site, TensorKey, TensorKind


class SiteLinearizedLora:
    """`LinearSiteAdapter` of one L-LoRA: DELTA_A [R, I], DELTA_B [O, R]."""

    def __init__(self, kind: LinearizedLoraKind, site: Site) -> None:
        self.site = site
        self._kind = kind
        self._delta_a = TensorKey(site.index, TensorKind.DELTA_A)
        self._delta_b = TensorKey(site.index, TensorKind.DELTA_B)

    @cached_property
    def base_a_RI(self) -> Tensor:
        """A0 in float64."""
        return torch.from_numpy(base_a(self._kind, self.site))

    @cached_property
    def base_b_OR(self) -> Tensor:
        """B0 in float64."""
        return torch.from_numpy(base_b(self._kind, self.site))

    def initial_weights(self, seed: int) -> dict[TensorKey, Tensor]:
        """Deltas of zero, whatever the seed."""
        shapes = site_weight_shapes(self._kind, self.site)
        return {key: torch.zeros(shape, dtype=torch.float64) for key, shape in shapes.items()}

    def forward(self, x_NI: Tensor, weights: Weights) -> Tensor:
        delta_a_RI, delta_b_OR = self.deltas(weights)
        a_RI, b_OR = self._base(delta_a_RI)
        return self._kind.scaling * (times(x_NI, a_RI) @ delta_b_OR.T + times(x_NI, delta_a_RI) @ b_OR.T)

    def gradient(self, x_NI: Tensor, grad_NO: Tensor, weights: Weights) -> Gradients:
        """d(delta A) = s (g B0)^T x, d(delta B) = s g^T (x A0^T)."""
        a_RI, b_OR = self._base(grad_NO)
        return self._gradients(outer(grad_NO @ b_OR, x_NI, self.site), grad_NO.T @ times(x_NI, a_RI))

    def gradient_of_product(self, product_OI: Tensor, grad_sum_O: Tensor, weights: Weights) -> Gradients:
        """d(delta A) = s B0^T G, d(delta B) = s G A0^T."""
        a_RI, b_OR = self._base(product_OI)
        return self._gradients(b_OR.T @ product_OI, product_OI @ a_RI.T)

    def add_delta_weight(self, weight_OI: Tensor, weights: Weights, factor: float) -> None:
        a_RI, b_OR = self._base(weight_OI)
        delta_a_RI, delta_b_OR = self.deltas(weights)
        alpha = factor * self._kind.scaling
        weight_OI.addmm_(delta_b_OR, a_RI, alpha=alpha)
        weight_OI.addmm_(b_OR, delta_a_RI, alpha=alpha)

    def deltas(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """(delta A, delta B) as matrices."""
        return input_matrix(weights[self._delta_a], self.site), output_matrix(
            weights[self._delta_b], self.site
        )

    def delta_bias(self, weights: Weights) -> Tensor | None:
        return None

    def _gradients(self, grad_a_RI: Tensor, grad_b_OR: Tensor) -> Gradients:
        s, site = self._kind.scaling, self.site
        return {
            self._delta_a: input_weight(s * grad_a_RI, site),
            self._delta_b: output_weight(s * grad_b_OR, site),
        }

    def _base(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(A0, B0) in the dtype and on the device of `like`."""
        return self.base_a_RI.to(like), self.base_b_OR.to(like)
