"""A registered module at one site: its forward, and its gradient by autograd. Shapes: N rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from cola_runtime.adapter_spec import ModuleKind
from cola_runtime.adapters.draws import torch_seed
from cola_runtime.adapters.module_registry import DRAWING, build_module
from cola_runtime.adapters.site_adapter import Gradients, Weights
from cola_runtime.types import Site, TensorKey, TensorKind


class SiteModule:
    """`SiteAdapter` of one registered module; MODULE with slot i is its i-th parameter."""

    def __init__(self, kind: ModuleKind, site: Site) -> None:
        self.site = site
        self._kind = kind
        self._module = build_module(kind, site.in_features, site.out_features).requires_grad_(False)
        self._keys = {
            name: TensorKey(site.index, TensorKind.MODULE, slot)
            for slot, (name, _) in enumerate(self._module.named_parameters())
        }

    def initial_weights(self, seed: int) -> dict[TensorKey, Tensor]:
        """The module's own initialisation under torch.manual_seed of (seed, site name)."""
        site = self.site
        with DRAWING, torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(f"{seed}/{site.name}"))
            module = build_module(self._kind, site.in_features, site.out_features)
        return {self._keys[name]: parameter.detach() for name, parameter in module.named_parameters()}

    def forward(self, x_NI: Tensor, weights: Weights) -> Tensor:
        parameters = {name: weights[key] for name, key in self._keys.items()}
        output_NO: Tensor = functional_call(self._module, parameters, (x_NI,))
        return self._kind.scaling * output_NO

    def gradient(self, x_NI: Tensor, grad_NO: Tensor, weights: Weights) -> Gradients:
        """By autograd; a parameter that the output does not depend on gets zeros."""
        with torch.enable_grad():
            leaves = {key: weights[key].detach().requires_grad_(True) for key in self._keys.values()}
            output_NO = self.forward(x_NI, leaves)
            gradients = torch.autograd.grad(
                output_NO, list(leaves.values()), grad_NO, allow_unused=True, materialize_grads=True
            )
        return dict(zip(leaves, gradients, strict=True))
