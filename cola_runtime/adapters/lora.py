"""LoRA's mathematics at one site: h = f(x) + s * B A x (arXiv:2106.09685).

Shapes: N rows, I in_features, O out_features, R rank. Knows nothing of base models, optimizers or the wire.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cola_runtime.adapter_spec import LoraKind
from cola_runtime.adapters.draws import normal, uniform
from cola_runtime.adapters.features import (
    input_matrix,
    input_weight,
    outer,
    output_matrix,
    output_weight,
    times,
)
from cola_runtime.adapters.shapes import site_weight_shapes
from cola_runtime.adapters.site_adapter import Gradients, Weights
from cola_runtime.types import Site, TensorKey, TensorKind


class SiteLora:
    """`LinearSiteAdapter` of one LoRA: LORA_A [R, I], LORA_B [O, R]; in a convolution's shapes at one."""

    def __init__(self, kind: LoraKind, site: Site) -> None:
        self.site = site
        self._kind = kind
        self._a = TensorKey(site.index, TensorKind.LORA_A)
        self._b = TensorKey(site.index, TensorKind.LORA_B)

    def initial_weights(self, seed: int) -> dict[TensorKey, Tensor]:
        """A from U(-1/sqrt(I), 1/sqrt(I)), peft's kaiming_uniform(a=sqrt(5)); B zero.

        At an embedding, as in peft, A is zero and B from N(0, 1).
        """
        shapes = site_weight_shapes(self._kind, self.site)
        weights = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in shapes.items()}
        name = f"{seed}/{self.site.name}"
        if self.site.takes_ids:
            weights[self._b] = normal(name, shapes[self._b], deviation=1.0)
        else:
            weights[self._a] = uniform(name, shapes[self._a], bound=self.site.in_features**-0.5)
        return weights

    def forward(self, x_NI: Tensor, weights: Weights) -> Tensor:
        a_RI, b_OR = self._factors(weights)
        return self._kind.scaling * (times(x_NI, a_RI) @ b_OR.T)

    def gradient(self, x_NI: Tensor, grad_NO: Tensor, weights: Weights) -> Gradients:
        """dA = s (g B)^T x, dB = s g^T (x A^T)."""
        a_RI, b_OR = self._factors(weights)
        return self._gradients(outer(grad_NO @ b_OR, x_NI, self.site), grad_NO.T @ times(x_NI, a_RI))

    def gradient_of_product(self, product_OI: Tensor, grad_sum_O: Tensor, weights: Weights) -> Gradients:
        """dA = s B^T G, dB = s G A^T."""
        a_RI, b_OR = self._factors(weights)
        return self._gradients(b_OR.T @ product_OI, product_OI @ a_RI.T)

    def add_delta_weight(self, weight_OI: Tensor, weights: Weights, factor: float) -> None:
        a_RI, b_OR = self._factors(weights)
        weight_OI.addmm_(b_OR, a_RI, alpha=factor * self._kind.scaling)

    def delta_bias(self, weights: Weights) -> Tensor | None:
        return None

    def _factors(self, weights: Weights) -> tuple[Tensor, Tensor]:
        return input_matrix(weights[self._a], self.site), output_matrix(weights[self._b], self.site)

    def _gradients(self, grad_a_RI: Tensor, grad_b_OR: Tensor) -> Gradients:
        s, site = self._kind.scaling, self.site
        return {self._a: input_weight(s * grad_a_RI, site), self._b: output_weight(s * grad_b_OR, site)}
