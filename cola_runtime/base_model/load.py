"""Reads a pretrained folder and refuses what the tapped base model cannot serve exactly."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cola_runtime.base_model.catalogue import site_catalogue
from cola_runtime.base_model.llama_weights import is_plain_llama
from cola_runtime.base_model.loss import VocabularyProjection
from cola_runtime.base_model.product_rate import matrix_product_flops
from cola_runtime.base_model.tapped import SiteGroup
from cola_runtime.errors import InvalidInput
from cola_runtime.types import Site

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
ATTENTIONS = ("eager", "sdpa")
_TRIAL_SHAPE = (4, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A frozen transformers model in evaluation mode and what was found out about it."""

    model: Any
    sites: tuple[Site, ...]
    groups: tuple[SiteGroup, ...]
    head: VocabularyProjection
    attention: str  # of transformers' own forward: generation, and training too unless `by_hand`
    by_hand: bool  # LlamaBody can compute it
    product_flops: float  # FLOP/s of matrix products in its dtype here


def load_frozen_model(path: Path, *, dtype: str, attention: str) -> LoadedModel:
    """Load, freeze, find the sites, and check that head(last hidden state) is what the model calls logits.

    Reads safetensors only. Sites of one group get one weight buffer. Raises InvalidInput for an unknown dtype
    or attention, and `BASE_MODEL_UNSUPPORTED` where the logits are not a plain projection.
    """
    if dtype not in DTYPES:
        raise _unknown("dtype", dtype, tuple(DTYPES))
    if attention not in ("auto", *ATTENTIONS):
        raise _unknown("attention", attention, ("auto", *ATTENTIONS))
    model = _read(path, DTYPES[dtype], "sdpa" if attention == "auto" else attention)
    sites = site_catalogue(model)
    head = VocabularyProjection.of(model)
    _check_plain_projection(model, head)
    groups = _site_groups(model, sites)
    by_hand = is_plain_llama(model, groups)
    if attention == "auto":
        attention = "sdpa" if by_hand else _faster_attention(model)
    return LoadedModel(
        model=model,
        sites=sites,
        groups=groups,
        head=head,
        attention=attention,
        by_hand=by_hand,
        product_flops=matrix_product_flops(DTYPES[dtype]),
    )


def _read(path: Path, dtype: torch.dtype, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=attention, use_safetensors=True, local_files_only=True
    )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _check_plain_projection(model: Any, head: VocabularyProjection) -> None:
    tokens = torch.tensor([[0, 1]])
    hidden_BTD = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    logits_BTV = torch.nn.functional.linear(hidden_BTD, head.weight_VD, head.bias_V)
    found_BTV = model(input_ids=tokens, use_cache=False).logits
    if not torch.allclose(logits_BTV, found_BTV, rtol=1e-2, atol=1e-2 * float(found_BTV.abs().max())):
        raise InvalidInput(
            "BASE_MODEL_UNSUPPORTED",
            f"{type(model).__name__} transforms its logits after the vocabulary projection",
            where="base_model",
            remedy="Use a base model without logit scaling or soft-capping.",
        )


def _site_groups(model: Any, sites: Sequence[Site]) -> tuple[SiteGroup, ...]:
    members: dict[int, list[Site]] = {}
    for site in sites:
        members.setdefault(site.input_group, []).append(site)
    groups = [
        SiteGroup(group, [model.get_submodule(site.name) for site in group]) for group in members.values()
    ]
    shared = _shared_storages(model)
    for group in groups:
        if not any(p.data_ptr() in shared for module in group.modules for p in module.parameters()):
            group.fuse()
    return tuple(groups)


def _shared_storages(model: Any) -> set[int]:
    """Addresses of weights that more than one module uses: moving one would untie it."""
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if parameter.data_ptr() in seen else seen).add(parameter.data_ptr())
    return shared


def _faster_attention(model: Any) -> str:
    """Set and return the implementation whose forward and backward take less time on this machine."""
    seconds = {name: _trial_seconds(model, name) for name in ATTENTIONS}
    best = min(seconds, key=lambda name: seconds[name])
    model.set_attn_implementation(best)
    return best


def _trial_seconds(model: Any, attention: str) -> float:
    """Best of two passes over a small batch; infinite where the model does not have the implementation."""
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        return float("inf")
    return min(_timed_pass(model) for _ in range(2))


def _timed_pass(model: Any) -> float:
    started = time.perf_counter()
    embedded_BTD = model.get_input_embeddings()(torch.zeros(_TRIAL_SHAPE, dtype=torch.int64))
    hidden_BTD = model.base_model(inputs_embeds=embedded_BTD.requires_grad_(True), use_cache=False)[0]
    hidden_BTD.sum().backward()
    return time.perf_counter() - started


def _unknown(field: str, value: str, known: Sequence[str]) -> InvalidInput:
    return InvalidInput(
        "SPEC_INVALID", f"{field} {value!r} is unknown", where=field, remedy=f"Use one of {', '.join(known)}."
    )
