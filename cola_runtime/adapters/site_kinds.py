"""Which adapter kinds can be at which site kinds. Torch-free: admission and readers of folders ask here."""

from __future__ import annotations

from collections.abc import Sequence

from cola_runtime.adapter_spec import AdapterKind, LinearKind, LoraKind, MlpKind, ModuleKind, input_dropout
from cola_runtime.errors import InvalidInput
from cola_runtime.types import Site, SiteKind

WHOLE_ROWS = (SiteKind.LINEAR, SiteKind.CONV1D)
"""Site kinds whose input is a row of numbers for every token: what presets name, and fit for every kind."""


def check_kind(kind: AdapterKind, sites: Sequence[Site], *, where: str) -> None:
    """Raises InvalidInput `SITE_UNSUPPORTED`, with the reason, for the first site where `kind` cannot be."""
    for site in sites:
        reason = unfit(kind, site)
        if reason is not None:
            raise InvalidInput(
                "SITE_UNSUPPORTED",
                f"no adapter of kind {kind.kind} can be at {site.name}: {reason}",
                where=where,
                remedy="Leave the module out, or give it a part of its own with another kind "
                "(docs/adapter_kinds.md); nothing was created.",
            )


def unfit(kind: AdapterKind, site: Site) -> str | None:
    """Why `kind` cannot be at `site`; None if it can."""
    if site.kind in WHOLE_ROWS:
        return None
    if input_dropout(kind):
        # peft drops an image's numbers before they are in patches, and nothing at an embedding.
        return f"dropout is for rows of numbers, this is an input of a {site.kind}"
    if site.kind is SiteKind.EMBEDDING:
        nonlinear = isinstance(kind, MlpKind | ModuleKind)
        return "its input is a token's id, which only kinds linear in x can take" if nonlinear else None
    return _unfit_groups(kind, site.groups)


def _unfit_groups(kind: AdapterKind, groups: int) -> str | None:
    if groups == 1 or isinstance(kind, LinearKind):
        return None
    if not isinstance(kind, LoraKind):
        return f"it convolves in {groups} groups, where only lora and linear are defined"
    if kind.rank % groups:
        return f"its {groups} groups do not divide rank {kind.rank}, which peft's LoRA there needs"
    return None
