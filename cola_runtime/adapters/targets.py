"""Which sites an adapter is attached to: presets, or names as PEFT matches them. No regular expressions."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from cola_runtime.adapters.site_kinds import WHOLE_ROWS
from cola_runtime.errors import InvalidInput, Violation
from cola_runtime.types import Site

ALL_LINEAR = "all-linear"
# Names of Llama's family (q_proj ...; Phi's fused qkv_proj, gate_up_proj), GPT-2's (c_attn ...), BERT's,
# ViT's (q_proj ..., mlp.fc1), ConvNeXt's (pwconv1), BART's and OPT's (out_proj, fc1 ...) and T5's; an
# encoder-decoder's attention is on each side and across.
# `c_proj` alone would name both of GPT-2's projections, hence the two parts; `output.dense` does name both of
# BERT's, hence a site belongs to the first preset that names it.
PRESETS: dict[str, tuple[str, ...]] = {
    "attention": (
        *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn", "attn.c_proj"),
        *("self.query", "self.key", "self.value", "attention.output.dense"),
        *("self_attn.out_proj", "encoder_attn.out_proj"),
        *(f"{attention}.{part}" for attention in ("SelfAttention", "EncDecAttention") for part in "qkvo"),
    ),
    "mlp": (
        *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "mlp.c_fc", "mlp.c_proj"),
        *("intermediate.dense", "output.dense"),
        *("fc1", "fc2", "pwconv1", "pwconv2"),
        *("DenseReluDense.wi", "DenseReluDense.wi_0", "DenseReluDense.wi_1", "DenseReluDense.wo"),
    ),
}
_LISTED_NAMES = 12


def resolve_target_sites(catalogue: Sequence[Site], target_modules: str | Sequence[str]) -> tuple[Site, ...]:
    """The sites that `target_modules` names, in catalogue order, each once; never empty.

    `all-linear` is every Linear and Conv1D of the catalogue (it has no LM head); `attention` and `mlp` go by
    the names in PRESETS. Convolutions and embeddings are in no preset: they are named.
    Anything else is matched as PEFT does: a module's full name, or its last dotted parts. Raises InvalidInput
    `NO_MODULE_MATCHED`, with near names, if a given name or a preset matches no site.
    """
    if isinstance(target_modules, str):
        preset = _preset_sites(catalogue, target_modules)
        target_modules = (target_modules,)
        if preset:
            return preset
    unmatched = [name for name in target_modules if not any(_matches(site, name) for site in catalogue)]
    if unmatched or not target_modules:
        raise _no_module_matched(catalogue, unmatched)
    return tuple(site for site in catalogue if any(_matches(site, name) for name in target_modules))


def _preset_sites(catalogue: Sequence[Site], preset: str) -> tuple[Site, ...]:
    named = (site for site in catalogue if site.kind in WHOLE_ROWS)
    return tuple(site for site in named if preset in (ALL_LINEAR, _preset_of(site)))


def _preset_of(site: Site) -> str | None:
    return next((key for key, names in PRESETS.items() if any(_matches(site, name) for name in names)), None)


def _matches(site: Site, name: str) -> bool:
    return site.name == name or site.name.endswith(f".{name}")


def _no_module_matched(catalogue: Sequence[Site], unmatched: Sequence[str]) -> InvalidInput:
    known = _short_names(catalogue)
    violations = tuple(
        Violation(where="target_modules", message=f"no module is named {name!r}{_near(name, known)}")
        for name in unmatched
    )
    return InvalidInput(
        "NO_MODULE_MATCHED",
        "; ".join(v.message for v in violations) or "target_modules is empty",
        where="target_modules",
        remedy=f"Use {ALL_LINEAR}, {', '.join(PRESETS)} or names of: {', '.join(known[:_LISTED_NAMES])}.",
        violations=violations,
    )


def _short_names(catalogue: Sequence[Site]) -> list[str]:
    """The last part of each site's name, in catalogue order, each once."""
    return list(dict.fromkeys(site.name.rpartition(".")[2] for site in catalogue))


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.rpartition(".")[2], known, n=3)
    return f"; near names: {', '.join(near)}" if near else ""
