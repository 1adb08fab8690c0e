"""LoRA and linearized LoRA as the two files of a PEFT folder, and back. Torch-free.

One folder holds several ranks and scalings (peft's rank_pattern and alpha_pattern). Shapes: I in_features,
O out_features, R rank.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from cola_runtime.adapter_spec import (
    AdapterKind,
    AdapterPart,
    AdapterSpec,
    LinearizedLoraKind,
    LoraKind,
)
from cola_runtime.adapters.folder_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFolder,
    TensorFile,
    base_model_name,
    folder_files,
    invalid,
    read_config,
)
from cola_runtime.adapters.linearized_base import base_a, base_b
from cola_runtime.adapters.shapes import site_weight_shapes
from cola_runtime.adapters.site_kinds import unfit
from cola_runtime.types import Patch, Site, SiteKind, TensorKey, TensorKind

_PREFIX = "base_model.model."
_SUFFIXES = {TensorKind.LORA_A: ".lora_A.weight", TensorKind.LORA_B: ".lora_B.weight"}
_EMBEDDING_SUFFIXES = {TensorKind.LORA_A: ".lora_embedding_A", TensorKind.LORA_B: ".lora_embedding_B"}
# Settings that change what the factors mean; a folder that uses one is not the adapter that we would compute.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
)
# A pattern that is a name: peft's patterns are regular expressions, those of a stranger's file are not run.
_NAME_PATTERN = re.compile(r"(\^?)((?:[A-Za-z0-9_.-]|\\[.-])+)")


class _Lora(NamedTuple):
    """What peft computes at one site: s = alpha / rank, or alpha / sqrt(rank) with use_rslora."""

    rank: int
    alpha: float
    use_rslora: bool

    @property
    def plain(self) -> _Lora:
        """The same s (to its rounding) without rsLoRA."""
        return _Lora(self.rank, self.alpha * self.rank**0.5, False) if self.use_rslora else self


Factors = tuple[NDArray[Any], NDArray[Any]]
"""A [R, I] and B [O, R], in a convolution's shapes at one."""


def fits_peft(spec: AdapterSpec) -> bool:
    """Whether PEFT has a kind for every part of the adapter.

    Its LoRA at a convolution leaves the dilation out, so it cannot compute one that has a dilation.
    """
    kinds = all(isinstance(part.kind, LoraKind | LinearizedLoraKind) for part in spec.parts)
    return kinds and not any(site.patch is not None and _is_dilated(site.patch) for site in spec.sites)


def _is_dilated(patch: Patch) -> bool:
    return any(size > 1 and step > 1 for size, step in zip(patch.kernel, patch.dilation, strict=True))


def peft_folder(
    spec: AdapterSpec,
    weights: Mapping[TensorKey, NDArray[Any]],
    base_model: str,
    *,
    task_type: str | None = "CAUSAL_LM",
) -> dict[str, bytes]:
    """File name -> content of a folder that `peft.PeftModel.from_pretrained` loads unchanged.

    `target_modules` are the sites' full names, so that an adapter on some layers only lands on just those.
    A linearized LoRA becomes the LoRA that it equals: [dB, B0] [A0; dA] of rank 2 R, or dB A0 of rank R where
    B0 is zero. Needs `fits_peft(spec)`.
    """
    loras: dict[Site, _Lora] = {}
    tensors: dict[str, NDArray[Any]] = {}
    for site in spec.sites:
        loras[site], factors = _lora_at(spec.kinds[site.index], site, weights)
        for kind, factor in zip(_SUFFIXES, factors, strict=True):
            tensors[_tensor_name(site, kind)] = factor
    dropout = max(getattr(part.kind, "dropout", 0.0) for part in spec.parts)
    own = {"task_type": task_type, "lora_dropout": dropout}  # peft has one dropout, used in its training only
    return folder_files({**_config(loras, base_model), **own}, tensors)


def _lora_at(
    kind: AdapterKind, site: Site, weights: Mapping[TensorKey, NDArray[Any]]
) -> tuple[_Lora, Factors]:
    def of(tensor: TensorKind) -> NDArray[Any]:
        return weights[TensorKey(site.index, tensor)]

    assert isinstance(kind, LoraKind | LinearizedLoraKind), "the caller asked fits_peft"
    lora = _Lora(kind.rank, kind.alpha, kind.use_rslora)
    if isinstance(kind, LoraKind):
        return lora, (of(TensorKind.LORA_A), of(TensorKind.LORA_B))
    delta_a_RI, delta_b_OR = of(TensorKind.DELTA_A), of(TensorKind.DELTA_B)
    a_RI = base_a(kind, site).astype(delta_a_RI.dtype).reshape(delta_a_RI.shape)
    if kind.initial_b == "zero":
        return lora, (a_RI, delta_b_OR)
    b_OR = base_b(kind, site).astype(delta_b_OR.dtype).reshape(delta_b_OR.shape)
    doubled = _Lora(2 * lora.rank, 2 * lora.plain.alpha, False)
    return doubled, (np.concatenate([a_RI, delta_a_RI]), np.concatenate([delta_b_OR, b_OR], axis=1))


def _tensor_name(site: Site, kind: TensorKind) -> str:
    suffixes = _EMBEDDING_SUFFIXES if site.takes_ids else _SUFFIXES
    return f"{_PREFIX}{site.name}{suffixes[kind]}"


def _config(loras: Mapping[Site, _Lora], base_model: str) -> dict[str, Any]:
    """One LoRA everywhere is written as it is. Where they differ each is plain, for peft has one flag of
    rsLoRA for all: the most frequent rank and alpha are the folder's, the others are patterns.
    """
    if len(set(loras.values())) > 1:
        loras = {site: lora.plain for site, lora in loras.items()}
    [(rank, _)] = Counter(lora.rank for lora in loras.values()).most_common(1)
    [(alpha, _)] = Counter(lora.alpha for lora in loras.values()).most_common(1)
    ranks = {site: lora.rank for site, lora in loras.items() if lora.rank != rank}
    alphas = {site: _shortest(lora.alpha) for site, lora in loras.items() if lora.alpha != alpha}
    return {
        "alpha_pattern": {_pattern(site): value for site, value in alphas.items()},
        "base_model_name_or_path": base_model,
        "bias": "none",
        # One flag for all modules: peft turns it off again for each Linear, and warns if a Conv1D lacks it.
        "fan_in_fan_out": any(site.kind is SiteKind.CONV1D for site in loras),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _shortest(alpha),
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {_pattern(site): value for site, value in ranks.items()},
        "target_modules": [site.name for site in loras],
        "use_dora": False,
        "use_rslora": any(lora.use_rslora for lora in loras.values()),
    }


def _shortest(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha


def _pattern(site: Site) -> str:
    """peft matches `(.*\\.)?(pattern)$` from the start of a module's name: this is the one site only."""
    return f"^{re.escape(site.name)}"


def read_peft_folder(files: Mapping[str, bytes], catalogue: Sequence[Site]) -> AdapterFolder:
    """The LoRA in a PEFT folder, checked against the base model's sites.

    Half-precision weights are widened to float32; the seed, which the folder does not know, is 0. Raises
    InvalidInput `ADAPTER_FILE_INVALID`, with file and tensor, for anything that is not a plain LoRA at these
    sites: names, shapes, pairs, non-finite values, patterns that are no names.
    """
    config = _read_config(files)
    tensors = TensorFile(files)
    kinds = _Kinds(config)
    dtype: Literal["float32", "float64"] = "float64" if tensors.is_double else "float32"
    parts: dict[LoraKind, list[Site]] = {}
    weights: dict[TensorKey, NDArray[Any]] = {}
    for site in _adapted_sites(tensors, catalogue):
        kind = kinds.at(site)
        parts.setdefault(kind, []).append(site)
        for key, shape in site_weight_shapes(kind, site).items():
            weights[key] = tensors.array(_tensor_name(site, key.kind), shape, dtype)
    spec = AdapterSpec(
        parts=tuple(AdapterPart(kind=kind, sites=tuple(sites)) for kind, sites in parts.items()),
        seed=0,
        dtype=dtype,
    )
    return AdapterFolder(spec=spec, weights=weights, base_model=base_model_name(config))


def _read_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    config = read_config(files)
    if config.get("peft_type") != "LORA":
        raise invalid(CONFIG_FILE, "does not say peft_type LORA")
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise invalid(CONFIG_FILE, f"uses {', '.join(used)}, which a plain LoRA does not have")
    return config


class _Kinds:
    """The LoRA of each site, as peft reads the config: the first pattern that matches, else the default."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._rank = _number("r", config.get("r"), whole=True)
        self._alpha = _number("lora_alpha", config.get("lora_alpha"))
        self._ranks = list(_patterns(config, "rank_pattern", whole=True))
        self._alphas = list(_patterns(config, "alpha_pattern"))
        self._use_rslora = config.get("use_rslora") is True

    def at(self, site: Site) -> LoraKind:
        rank = next((value for name, value in self._ranks if _matches(name, site)), self._rank)
        alpha = next((value for name, value in self._alphas if _matches(name, site)), self._alpha)
        try:
            kind = LoraKind(rank=int(rank), alpha=alpha, use_rslora=self._use_rslora)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise invalid(
                CONFIG_FILE, f"has {first['loc'][-1]} {first['input']} at {site.name}: {first['msg']}"
            ) from error
        reason = unfit(kind, site)
        if reason is not None:
            raise invalid(CONFIG_FILE, f"has a LoRA at {site.name}, where none can be: {reason}")
        return kind


def _patterns(
    config: Mapping[str, Any], name: str, *, whole: bool = False
) -> Iterator[tuple[tuple[bool, str], float]]:
    """(anchored, module name) and its value, in the file's order."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise invalid(CONFIG_FILE, f"{name} must be an object, got {patterns!r:.60}")
    for pattern, value in patterns.items():
        match = _NAME_PATTERN.fullmatch(pattern)
        if match is None:
            raise invalid(CONFIG_FILE, f"{name} holds {pattern!r:.100}, which is not a module's name")
        anchor, module = match.groups()
        yield (bool(anchor), module.replace("\\", "")), _number(f"{name} {pattern!r}", value, whole=whole)


def _matches(pattern: tuple[bool, str], site: Site) -> bool:
    anchored, name = pattern
    return site.name == name or (not anchored and site.name.endswith(f".{name}"))


def _number(name: str, value: object, *, whole: bool = False) -> float:
    fits = (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )
    if not fits or (whole and not isinstance(value, int)):
        raise invalid(
            CONFIG_FILE, f"{name} must be a {'whole ' if whole else ''}number above 0, got {value!r}"
        )
    assert isinstance(value, int | float)
    return value if whole else float(value)


def _adapted_sites(tensors: TensorFile, catalogue: Sequence[Site]) -> list[Site]:
    """The sites that have both factors, in catalogue order."""
    places = {_tensor_name(site, kind): (site, kind) for site in catalogue for kind in _SUFFIXES}
    found: dict[Site, list[TensorKind]] = {}
    for name in tensors.names:
        if name not in places:
            raise invalid(WEIGHTS_FILE, f"tensor {name!r} belongs to no site of the base model")
        site, kind = places[name]
        found.setdefault(site, []).append(kind)
    for site, kinds in found.items():
        if len(kinds) == 1:
            raise invalid(WEIGHTS_FILE, f"site {site.name!r} has {kinds[0].name} only, it needs both factors")
    return sorted(found, key=lambda site: site.index)
