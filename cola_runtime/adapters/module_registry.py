"""Users' own adapter modules: any `nn.Module` from [N, in_features] to [N, out_features], registered by name.

The base model computes the forward, the device trains it by autograd from x and g. Every process must have
registered the module: the service's setting `adapter_modules` names the Python modules that do so on import.
Torch-free: only the factories know torch.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cola_runtime.adapter_spec import ModuleKind, OptionValue
from cola_runtime.errors import InvalidInput

ModuleFactory = Callable[[int, int, Mapping[str, OptionValue]], Any]
"""(in_features, out_features, the job's options) -> nn.Module without buffers; raises for wrong options."""

MAX_PARAMETERS = 64

_factories: dict[str, ModuleFactory] = {}

DRAWING = threading.RLock()
"""Held while a module is made: initialisations draw from torch's one generator, which all threads share."""


def register_adapter_module(name: str, factory: ModuleFactory) -> None:
    """Make `kind: module, name: <name>` available in this process. Raises ValueError if it is taken."""
    if _factories.get(name, factory) is not factory:
        raise ValueError(f"an adapter module is already registered as {name!r}")
    _factories[name] = factory


def import_adapter_modules(names: Iterable[str]) -> None:
    """Import the Python modules that register adapter modules; importing one again does nothing.

    They are the operator's: their names come from the settings, never from a job. Raises InvalidInput
    ADAPTER_MODULE_IMPORT.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever the operator's own code raises
            raise InvalidInput(
                "ADAPTER_MODULE_IMPORT",
                f"Python module {name!r} cannot be imported: {type(error).__name__}: {error}",
                where="adapter_modules",
                remedy="Install it, or put its folder into PYTHONPATH, for every process of the service.",
            ) from error


def build_module(kind: ModuleKind, in_features: int, out_features: int) -> Any:
    """The module in float64 and in evaluation mode, its parameters as its own initialisation left them.

    Raises InvalidInput ADAPTER_MODULE_UNKNOWN; ADAPTER_MODULE_INVALID for options that the factory refused,
    or for a module that keeps state between calls or has too many parameters.
    """
    factory = _factories.get(kind.name)
    if factory is None:
        raise InvalidInput(
            "ADAPTER_MODULE_UNKNOWN",
            f"no adapter module is registered as {kind.name!r}",
            where="job.adapter.name",
            remedy=f"Registered: {', '.join(sorted(_factories)) or 'none'} (docs/adapter_kinds.md).",
        )
    try:
        with DRAWING:
            module = factory(in_features, out_features, dict(kind.options)).double().eval()
    except Exception as error:  # the factory is the operator's, its options are the tenant's
        raise _invalid(kind, f"cannot be made: {type(error).__name__}: {error}") from error
    parameters = len(list(module.parameters()))
    if any(True for _ in module.buffers()) or not 1 <= parameters <= MAX_PARAMETERS:
        raise _invalid(
            kind, f"has {parameters} parameters, or buffers; it may have 1 to {MAX_PARAMETERS} and no buffers"
        )
    return module


@functools.lru_cache(maxsize=4096)
def module_shapes(kind: ModuleKind, in_features: int, out_features: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of the module's parameters, in `named_parameters()` order; a parameter's place is its slot.

    Also tries the module once. Raises as `build_module`, and ADAPTER_MODULE_INVALID where it does not map
    [N, in_features] to [N, out_features].
    """
    module = build_module(kind, in_features, out_features)
    parameters = list(module.parameters())
    try:
        found = tuple(module(parameters[0].new_zeros((2, in_features))).shape)
    except Exception as error:  # the operator's module may raise anything
        raise _invalid(kind, f"cannot be computed: {type(error).__name__}: {error}") from error
    if found != (2, out_features):
        raise _invalid(kind, f"gives shape {found} for an input of shape {(2, in_features)}")
    return tuple(tuple(parameter.shape) for parameter in parameters)


def _invalid(kind: ModuleKind, problem: str) -> InvalidInput:
    return InvalidInput(
        "ADAPTER_MODULE_INVALID",
        f"adapter module {kind.name!r} {problem}",
        where="job.adapter.options",
        remedy="Correct the options; docs/adapter_kinds.md says what a module must be.",
    )
