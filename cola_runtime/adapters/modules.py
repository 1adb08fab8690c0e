"""Users' own adapter modules: any `nn.Module` from [N, in_features] to [N, out_features], registered by name.

The base model computes the forward, the device trains it by autograd from x and g. Every process must have
registered the module: the service's setting `adapter_modules` names the Python modules that do so on import.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cola_runtime.adapter_spec import ModuleKind, OptionValue
from cola_runtime.adapters.draws import torch_seed
from cola_runtime.adapters.site_adapter import Gradients, Weights
from cola_runtime.errors import InvalidInput
from cola_runtime.types import Site, TensorKey, TensorKind

ModuleFactory = Callable[[int, int, Mapping[str, OptionValue]], nn.Module]
"""(in_features, out_features, the job's options) -> module. No buffers, no dropout, at most 64 parameters."""

MAX_PARAMETERS = 64

_factories: dict[str, ModuleFactory] = {}


def register_adapter_module(name: str, factory: ModuleFactory) -> None:
    """Make `kind: module, name: <name>` available in this process. Raises ValueError if it is taken."""
    if _factories.get(name, factory) is not factory:
        raise ValueError(f"an adapter module is already registered as {name!r}")
    _factories[name] = factory


def build_module(kind: ModuleKind, site: Site) -> nn.Module:
    """The module in float64, its parameters as its own initialisation left them.

    Raises InvalidInput ADAPTER_MODULE_UNKNOWN, or ADAPTER_MODULE_INVALID for one that keeps state between
    calls or has too many parameters.
    """
    factory = _factories.get(kind.name)
    if factory is None:
        raise InvalidInput(
            "ADAPTER_MODULE_UNKNOWN",
            f"no adapter module is registered as {kind.name!r}",
            where="job.adapter.name",
            remedy=f"Registered: {', '.join(sorted(_factories)) or 'none'} (docs/adapter_kinds.md).",
        )
    module = factory(site.in_features, site.out_features, dict(kind.options)).double()
    parameters = len(list(module.parameters()))
    if any(True for _ in module.buffers()) or not 1 <= parameters <= MAX_PARAMETERS:
        raise InvalidInput(
            "ADAPTER_MODULE_INVALID",
            f"adapter module {kind.name!r} has buffers, or {parameters} parameters",
            limit=MAX_PARAMETERS,
            actual=parameters,
            remedy="An adapter module has parameters only: what it computes depends on nothing else.",
        )
    return module


@functools.lru_cache(maxsize=4096)
def module_shapes(kind: ModuleKind, site: Site) -> tuple[tuple[int, ...], ...]:
    """Shapes of the module's parameters, in `named_parameters()` order; a parameter's place is its slot."""
    return tuple(tuple(parameter.shape) for parameter in build_module(kind, site).parameters())


class SiteModule:
    """`SiteAdapter` of one registered module; MODULE with slot i is its i-th parameter."""

    def __init__(self, kind: ModuleKind, site: Site) -> None:
        self.site = site
        self._kind = kind
        self._module = build_module(kind, site).requires_grad_(False)
        self._keys = {
            name: TensorKey(site.index, TensorKind.MODULE, slot)
            for slot, (name, _) in enumerate(self._module.named_parameters())
        }

    def initial_weights(self, seed: int) -> dict[TensorKey, Tensor]:
        """The module's own initialisation under torch.manual_seed of (seed, site name)."""
        site = self.site
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(f"{seed}/{site.name}"))
            module = build_module(self._kind, site)
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
