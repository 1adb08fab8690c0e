"""Users' own adapter modules: any `nn.Module` from [N, in_features] to [N, out_features], registered by name.

The base model computes the forward, the device trains it by autograd from x and g. Every process must have
registered the module: the service's setting `adapter_modules` names the Python modules that do so on import.
Torch-free: only the factories know torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from cola_runtime.adapter_spec import ModuleKind, OptionValue
from cola_runtime.errors import InvalidInput
from cola_runtime.types import Site

ModuleFactory = Callable[[int, int, Mapping[str, OptionValue]], Any]
"""(in_features, out_features, the job's options) -> nn.Module without buffers and dropout."""

MAX_PARAMETERS = 64

_factories: dict[str, ModuleFactory] = {}


def register_adapter_module(name: str, factory: ModuleFactory) -> None:
    """Make `kind: module, name: <name>` available in this process. Raises ValueError if it is taken."""
    if _factories.get(name, factory) is not factory:
        raise ValueError(f"an adapter module is already registered as {name!r}")
    _factories[name] = factory


def build_module(kind: ModuleKind, site: Site) -> Any:
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
