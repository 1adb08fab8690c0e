"""Activation checkpointing of a stock model: a layer keeps its input alone and is computed again in backward.

A recomputed layer adds the adapters once more to outputs of its own. It hands out nothing: taps leave in the
backward pass, which runs once, over the tensors of the recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from cola_runtime.base_model.site_groups import SiteGroup
from cola_runtime.errors import InvalidInput


def checkpoint_layers(model: Any, groups: Iterable[SiteGroup]) -> None:
    """Patch every outermost layer in place; without gradients it computes exactly as before.

    Of a group whose sites lie in several layers (a decoder's keys and values of the encoder's output) the
    first layer computes all outputs, so they are kept for the others.

    Not by transformers' own switch, which asks for a layer in training mode: that would drop out, too.
    Raises InvalidInput `CHECKPOINTING_UNSUPPORTED` for a model without layers that may be computed again.
    """
    layers = _outermost_layers(model)
    if not layers:
        raise InvalidInput(
            "CHECKPOINTING_UNSUPPORTED",
            f"{type(model).__name__} has no layers that transformers checkpoints",
            where="base_model.activation_checkpointing",
            remedy="Set base_model.activation_checkpointing to false, or serve another base model.",
        )
    for layer in layers.values():
        layer.forward = _checkpointed(layer.forward)
    for group in groups:
        group.spans_layers = len({_layer_of(site.name, list(layers)) for site in group.sites}) > 1


def _outermost_layers(model: Any) -> dict[str, Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: dict[str, Any] = {}
    for name, module in model.named_modules():  # a layer that is used twice has one name
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found[name] = module
    return found


def _layer_of(site: str, layers: Sequence[str]) -> str | None:
    return next((layer for layer in layers if site.startswith(f"{layer}.")), None)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # A frozen model in evaluation mode draws nothing: there is no generator's state to keep.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return recomputed
