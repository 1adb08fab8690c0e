"""What modules are called with in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def first_inputs(modules: Mapping[str, nn.Module], forward: Callable[[], object]) -> dict[str, Tensor]:
    """The x of every module's first call, without gradients; a module that is not called is left out.

    All are kept until the end, so that no two share an id.
    """
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _m, args, name=name: _note(seen, name, args[0]))
        for name, module in modules.items()
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _note(seen: dict[str, Tensor], name: str, x: Tensor) -> None:
    seen.setdefault(name, x)
