"""LoRA's mathematics at one site: h = f(x) + s * B A x (arXiv:2106.09685).

Shapes: N rows, I in_features, O out_features, R rank. Knows nothing of base models, optimizers or the wire.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cola_runtime.adapter_spec import LoraKind
from cola_runtime.adapters.draws import uniform
from cola_runtime.adapters.site_adapter import Gradients, Weights
from cola_runtime.types import Site, TensorKey, TensorKind


class SiteLora:
    """`LinearSiteAdapter` of one LoRA: LORA_A [R, I], LORA_B [O, R]."""

    def __init__(self, kind: LoraKind, site: Site) -> None:
        self.site = site
        self._kind = kind
        self._a = TensorKey(site.index, TensorKind.LORA_A)
        self._b = TensorKey(site.index, TensorKind.LORA_B)

    def initial_weights(self, seed: int) -> dict[TensorKey, Tensor]:
        """A from U(-1/sqrt(I), 1/sqrt(I)), peft's kaiming_uniform(a=sqrt(5)); B zero."""
        rank, site = self._kind.rank, self.site
        a_RI = uniform(f"{seed}/{site.name}", (rank, site.in_features), bound=site.in_features**-0.5)
        return {self._a: a_RI, self._b: torch.zeros(site.out_features, rank, dtype=torch.float64)}

    def forward(self, x_NI: Tensor, weights: Weights) -> Tensor:
        return self._kind.scaling * (x_NI @ weights[self._a].T @ weights[self._b].T)

    def gradient(self, x_NI: Tensor, grad_NO: Tensor, weights: Weights) -> Gradients:
        """dA = s (g B)^T x, dB = s g^T (x A^T)."""
        s = self._kind.scaling
        return {
            self._a: s * ((grad_NO @ weights[self._b]).T @ x_NI),
            self._b: s * (grad_NO.T @ (x_NI @ weights[self._a].T)),
        }

    def gradient_of_product(self, product_OI: Tensor, grad_sum_O: Tensor, weights: Weights) -> Gradients:
        """dA = s B^T G, dB = s G A^T."""
        s = self._kind.scaling
        return {
            self._a: s * (weights[self._b].T @ product_OI),
            self._b: s * (product_OI @ weights[self._a].T),
        }

    def add_delta_weight(self, weight_OI: Tensor, weights: Weights, factor: float) -> None:
        weight_OI.addmm_(weights[self._b], weights[self._a], alpha=factor * self._kind.scaling)

    def delta_bias(self, weights: Weights) -> Tensor | None:
        return None
