"""Linearized LoRA at one site: h = f(x) + s * (dB A0 + B0 dA) x, the tangent of LoRA at (A0, B0).

Partial linearization (ICLR 2024): linear in its weights too, so adapters of one base_seed add exactly and a
gradient does not depend on the current deltas. Shapes: N rows, I in_features, O out_features, R rank.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from cola_runtime.adapter_spec import LinearizedLoraKind
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
        delta_a_RI, delta_b_OR = weights[self._delta_a], weights[self._delta_b]
        a_RI, b_OR = self._base(delta_a_RI)
        return self._kind.scaling * (x_NI @ a_RI.T @ delta_b_OR.T + x_NI @ delta_a_RI.T @ b_OR.T)

    def gradient(self, x_NI: Tensor, grad_NO: Tensor, weights: Weights) -> Gradients:
        """d(delta A) = s (g B0)^T x, d(delta B) = s g^T (x A0^T)."""
        a_RI, b_OR = self._base(x_NI)
        s = self._kind.scaling
        return {
            self._delta_a: s * ((grad_NO @ b_OR).T @ x_NI),
            self._delta_b: s * (grad_NO.T @ (x_NI @ a_RI.T)),
        }

    def gradient_of_product(self, product_OI: Tensor, grad_sum_O: Tensor, weights: Weights) -> Gradients:
        """d(delta A) = s B0^T G, d(delta B) = s G A0^T."""
        a_RI, b_OR = self._base(product_OI)
        s = self._kind.scaling
        return {self._delta_a: s * (b_OR.T @ product_OI), self._delta_b: s * (product_OI @ a_RI.T)}

    def add_delta_weight(self, weight_OI: Tensor, weights: Weights, factor: float) -> None:
        a_RI, b_OR = self._base(weight_OI)
        alpha = factor * self._kind.scaling
        weight_OI.addmm_(weights[self._delta_b], a_RI, alpha=alpha)
        weight_OI.addmm_(b_OR, weights[self._delta_a], alpha=alpha)

    def delta_bias(self, weights: Weights) -> Tensor | None:
        return None

    def _base(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(A0, B0) in the dtype and on the device of `like`."""
        return self.base_a_RI.to(like), self.base_b_OR.to(like)
