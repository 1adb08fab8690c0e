"""The MLP adapter at one site: h = f(x) + s * (W2 act(W1 x + b1) + b2).

Shapes: N rows, I in_features, O out_features, F hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from cola_runtime.adapter_spec import MlpKind
from cola_runtime.adapters.draws import uniform
from cola_runtime.adapters.site_adapter import Gradients, Weights
from cola_runtime.types import Site, TensorKey, TensorKind

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def activation_slope(activation: str, u_NF: Tensor) -> tuple[Tensor, Tensor]:
    """act(u) and act'(u). The slope is autograd's: every activation has exactly torch's derivative."""
    with torch.enable_grad():
        leaf_NF = u_NF.detach().requires_grad_(True)
        h_NF = ACTIVATIONS[activation](leaf_NF)
        (slope_NF,) = torch.autograd.grad(h_NF, leaf_NF, torch.ones_like(h_NF))
    return h_NF.detach(), slope_NF


class SiteMlp:
    """`SiteAdapter` of one MLP: MLP_IN [F, I], MLP_IN_BIAS [F], MLP_OUT [O, F], MLP_OUT_BIAS [O]."""

    def __init__(self, kind: MlpKind, site: Site) -> None:
        self.site = site
        self._kind = kind
        self._in, self._in_bias, self._out, self._out_bias = (
            TensorKey(site.index, tensor)
            for tensor in (
                TensorKind.MLP_IN,
                TensorKind.MLP_IN_BIAS,
                TensorKind.MLP_OUT,
                TensorKind.MLP_OUT_BIAS,
            )
        )

    def initial_weights(self, seed: int) -> dict[TensorKey, Tensor]:
        """W1 and b1 as torch.nn.Linear draws them, U(-1/sqrt(I), 1/sqrt(I)); W2 and b2 zero."""
        hidden, site = self._kind.hidden, self.site
        bound = site.in_features**-0.5
        return {
            self._in: uniform(f"{seed}/{site.name}", (hidden, site.in_features), bound=bound),
            self._in_bias: uniform(f"{seed}/{site.name}/b", (hidden,), bound=bound),
            self._out: torch.zeros(site.out_features, hidden, dtype=torch.float64),
            self._out_bias: torch.zeros(site.out_features, dtype=torch.float64),
        }

    def forward(self, x_NI: Tensor, weights: Weights) -> Tensor:
        u_NF = functional.linear(x_NI, weights[self._in], weights[self._in_bias])
        h_NF = ACTIVATIONS[self._kind.activation](u_NF)
        return self._kind.scaling * functional.linear(h_NF, weights[self._out], weights[self._out_bias])

    def gradient(self, x_NI: Tensor, grad_NO: Tensor, weights: Weights) -> Gradients:
        u_NF = functional.linear(x_NI, weights[self._in], weights[self._in_bias])
        h_NF, slope_NF = activation_slope(self._kind.activation, u_NF)
        grad_NO = self._kind.scaling * grad_NO
        grad_u_NF = (grad_NO @ weights[self._out]) * slope_NF
        return {
            self._in: grad_u_NF.T @ x_NI,
            self._in_bias: grad_u_NF.sum(dim=0),
            self._out: grad_NO.T @ h_NF,
            self._out_bias: grad_NO.sum(dim=0),
        }
