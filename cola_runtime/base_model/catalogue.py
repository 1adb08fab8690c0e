"""Finds the sites of a model: every Linear, Conv1D, Conv2d and Embedding that its last hidden state needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cola_runtime.adapters.patches import positions
from cola_runtime.adapters.site_modules import module_patch, module_site, site_kind
from cola_runtime.base_model.encoder_decoders import decode
from cola_runtime.base_model.images import TRACED_IMAGES, Shape, traced_images
from cola_runtime.base_model.tracing import first_inputs
from cola_runtime.types import Site, SiteKind

TRACED_TOKENS = torch.tensor([[0, 1], [1, 0], [0, 0]])


_PLACES = (SiteKind.LINEAR, SiteKind.CONV1D), (SiteKind.CONV2D, SiteKind.EMBEDDING)


def site_catalogue(model: Any, image_shape: Shape | None = None) -> tuple[Site, ...]:
    """All sites, numbered from 0: Linear and Conv1D modules in `named_modules()` order, then the others.

    Sites that get the very same x share a group; convolutions of one x do if their patches are alike, too.
    Traces one forward pass over rows of two tokens, or over images of `image_shape`. A module that this pass
    never calls is no site, nor is one that does not see every token of every row (an expert's, or positions
    that are embedded once for all rows), for tenants could not be told apart there. A module called more than
    once belongs to the group of its first call.
    """
    modules = dict(_candidates(model))
    if image_shape is None:
        seen = first_inputs(modules, lambda: _traced(model))
        inputs = {name: x for name, x in seen.items() if _holds_every_token(modules[name], x)}
    else:
        inputs = traced_images(model, image_shape, modules)
    group_of: dict[object, int] = {}
    sites: list[Site] = []
    for name, module in modules.items():
        if name not in inputs:
            continue
        key = (id(inputs[name]), module_patch(module))
        group = group_of.setdefault(key, len(group_of))
        site = module_site(module, index=len(sites), name=name, input_group=group)
        sites.append(site if image_shape is None else replace(site, positions=_positions(site, inputs[name])))
    return tuple(sites)


def source_groups(model: Any, sites: Sequence[Site]) -> frozenset[int]:
    """Of an encoder-decoder the input groups whose x is of the source's tokens: the encoder's, and those by
    which the decoder attends to what it encoded. Traces rows of two source tokens and three target tokens.
    """
    source_BS = TRACED_TOKENS
    target_BT = torch.zeros(len(source_BS), source_BS.shape[1] + 1, dtype=torch.int64)
    modules = {site.name: model.get_submodule(site.name) for site in sites}
    inputs = first_inputs(modules, lambda: decode(model, source_BS, torch.ones_like(source_BS), target_BT))
    return frozenset(
        site.input_group
        for site in sites
        if _token_count(modules[site.name], inputs[site.name]) == source_BS.numel()
    )


def _candidates(model: Any) -> Iterator[tuple[str, nn.Module]]:
    pooler = getattr(model.base_model, "pooler", None)  # behind the last hidden state
    pooling = set(pooler.modules()) if pooler is not None else set()
    for kinds in _PLACES:
        for name, module in model.named_modules():
            if site_kind(module) in kinds and module not in pooling:
                yield name, module


def _positions(site: Site, x: Tensor) -> int:
    """Of one image at the site."""
    if site.patch is None:
        return x.numel() // (TRACED_IMAGES * x.shape[-1])
    height, width = positions(site.patch, *x.shape[-2:])
    return height * width


def _holds_every_token(module: nn.Module, x: Tensor) -> bool:
    if site_kind(module) is SiteKind.CONV2D:
        return False  # of text nothing is known
    return _token_count(module, x) == TRACED_TOKENS.numel()


def _token_count(module: nn.Module, x: Tensor) -> int:
    """Rows and tokens may be flattened into one dimension; an embedding's x are the tokens themselves."""
    return x.numel() if site_kind(module) is SiteKind.EMBEDDING else x.numel() // x.shape[-1]


def _traced(model: Any) -> None:
    if model.config.is_encoder_decoder:
        decode(model, TRACED_TOKENS, torch.ones_like(TRACED_TOKENS), TRACED_TOKENS)
    else:
        model.base_model(input_ids=TRACED_TOKENS, use_cache=False)
