"""Finds the sites of a transformer: every Linear and Conv1D that its last hidden state depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cola_runtime.base_model.encoder_decoders import decode
from cola_runtime.types import Site, SiteKind

TRACED_TOKENS = torch.tensor([[0, 1], [1, 0], [0, 0]])


def site_catalogue(model: Any) -> tuple[Site, ...]:
    """All sites in `named_modules()` order, numbered from 0; sites that get the very same x share a group.

    Traces one forward pass over rows of two tokens. A module that this pass never calls is no site, nor is
    one that does not see every token of every row (an expert's), for tenants could not be told apart there.
    A module called more than once belongs to the group of its first call.
    """
    modules = dict(_candidates(model))
    inputs = _first_inputs(modules, lambda: _traced(model))
    group_of: dict[int, int] = {}
    sites: list[Site] = []
    for name, module in modules.items():
        if name not in inputs or inputs[name].numel() != TRACED_TOKENS.numel() * inputs[name].shape[-1]:
            continue
        group = group_of.setdefault(id(inputs[name]), len(group_of))
        out_features, in_features = _shape(module)
        sites.append(
            Site(
                index=len(sites),
                name=name,
                kind=_kind(module),
                in_features=in_features,
                out_features=out_features,
                input_group=group,
            )
        )
    return tuple(sites)


def source_groups(model: Any, sites: Sequence[Site]) -> frozenset[int]:
    """Of an encoder-decoder the input groups whose x is of the source's tokens: the encoder's, and those by
    which the decoder attends to what it encoded. Traces rows of two source tokens and three target tokens.
    """
    source_BS = TRACED_TOKENS
    target_BT = torch.zeros(len(source_BS), source_BS.shape[1] + 1, dtype=torch.int64)
    modules = {site.name: model.get_submodule(site.name) for site in sites}
    inputs = _first_inputs(modules, lambda: decode(model, source_BS, torch.ones_like(source_BS), target_BT))
    tokens = source_BS.numel()
    return frozenset(
        site.input_group for site in sites if inputs[site.name].numel() == tokens * site.in_features
    )


def _candidates(model: Any) -> Iterator[tuple[str, nn.Module]]:
    from transformers.pytorch_utils import Conv1D

    pooler = getattr(model.base_model, "pooler", None)  # behind the last hidden state
    pooling = set(pooler.modules()) if pooler is not None else set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module not in pooling:
            yield name, module


def _traced(model: Any) -> None:
    if model.config.is_encoder_decoder:
        decode(model, TRACED_TOKENS, torch.ones_like(TRACED_TOKENS), TRACED_TOKENS)
    else:
        model.base_model(input_ids=TRACED_TOKENS, use_cache=False)


def _first_inputs(modules: dict[str, nn.Module], forward: Callable[[], object]) -> dict[str, Tensor]:
    """The x of every module's first call. All are kept until the end, so that no two share an id."""
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


def _kind(module: nn.Module) -> SiteKind:
    return SiteKind.LINEAR if isinstance(module, nn.Linear) else SiteKind.CONV1D


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    weight: Any = module.weight
    rows, columns = weight.shape
    return (rows, columns) if _kind(module) is SiteKind.LINEAR else (columns, rows)
