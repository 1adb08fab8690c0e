"""An adapter as the two files of a PEFT folder, and back. Torch-free: numpy and safetensors only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from cola_runtime.adapter_spec import AdapterSpec, LoraKind
from cola_runtime.errors import InvalidInput
from cola_runtime.types import Site, SiteKind, TensorKey, TensorKind

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_SUFFIXES = {TensorKind.LORA_A: ".lora_A.weight", TensorKind.LORA_B: ".lora_B.weight"}
# Settings that change what the factors mean; a folder that uses one is not the adapter that we would compute.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
)


class PeftAdapter(NamedTuple):
    """What a PEFT folder holds. `weights` has LORA_A [R, I] and LORA_B [O, R] of each adapted site."""

    rank: int
    alpha: float
    use_rslora: bool
    weights: dict[TensorKey, NDArray[Any]]


def peft_folder(
    spec: AdapterSpec, weights: Mapping[TensorKey, NDArray[Any]], base_model: str
) -> dict[str, bytes]:
    """File name -> content of a folder that `peft.PeftModel.from_pretrained` loads unchanged.

    `target_modules` are the sites' full names, so that an adapter on some layers only lands on just those.
    """
    tensors = {
        _tensor_name(site, kind): np.ascontiguousarray(weights[TensorKey(site.index, kind)])
        for site in spec.sites
        for kind in _SUFFIXES
    }
    return {
        CONFIG_FILE: (json.dumps(_config(spec, base_model), indent=2) + "\n").encode(),
        WEIGHTS_FILE: safetensors.numpy.save(tensors, metadata={"format": "pt"}),
    }


def _tensor_name(site: Site, kind: TensorKind) -> str:
    return f"{_PREFIX}{site.name}{_SUFFIXES[kind]}"


def _config(spec: AdapterSpec, base_model: str) -> dict[str, Any]:
    kind = spec.parts[0].kind
    assert isinstance(kind, LoraKind)
    return {
        "base_model_name_or_path": base_model,
        "bias": "none",
        # One flag for all modules: peft turns it off again for each Linear, and warns if a Conv1D lacks it.
        "fan_in_fan_out": any(site.kind is SiteKind.CONV1D for site in spec.sites),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(kind.alpha) if kind.alpha.is_integer() else kind.alpha,
        "lora_dropout": kind.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": kind.rank,
        "target_modules": [site.name for site in spec.sites],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": kind.use_rslora,
    }


def read_peft_folder(files: Mapping[str, bytes], catalogue: Sequence[Site]) -> PeftAdapter:
    """The adapter in a PEFT folder, checked against the base model's sites.

    Half-precision weights are widened to float32. Raises InvalidInput `ADAPTER_FILE_INVALID`, with file and
    tensor, for anything that is not a plain LoRA at these sites: names, shapes, pairs, non-finite values.
    """
    config = _read_config(files)
    rank = _number(config, "r", whole=True)
    weights = dict(_read_weights(files, catalogue, int(rank)))
    _check_pairs(weights, catalogue)
    return PeftAdapter(int(rank), _number(config, "lora_alpha"), config.get("use_rslora") is True, weights)


def _read_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        config = json.loads(_file(files, CONFIG_FILE))
    except ValueError as error:
        raise _invalid(CONFIG_FILE, f"is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise _invalid(CONFIG_FILE, "does not say peft_type LORA")
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise _invalid(CONFIG_FILE, f"uses {', '.join(used)}, which a plain LoRA does not have")
    return config


def _number(config: Mapping[str, Any], name: str, *, whole: bool = False) -> float:
    value = config.get(name)
    fits = (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )
    if not fits or (whole and not isinstance(value, int)):
        raise _invalid(
            CONFIG_FILE, f"{name} must be a {'whole ' if whole else ''}number above 0, got {value!r}"
        )
    assert isinstance(value, int | float)
    return value if whole else float(value)


def _read_weights(
    files: Mapping[str, bytes], catalogue: Sequence[Site], rank: int
) -> Iterator[tuple[TensorKey, NDArray[Any]]]:
    places = {_tensor_name(site, kind): (site, kind) for site in catalogue for kind in _SUFFIXES}
    try:
        tensors = safetensors.deserialize(_file(files, WEIGHTS_FILE))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise _invalid(WEIGHTS_FILE, f"is not safetensors: {error}") from error
    for name, tensor in sorted(tensors):  # the first wrong tensor that is named is always the same one
        if name not in places:
            raise _invalid(WEIGHTS_FILE, f"tensor {name!r} belongs to no site of the base model")
        site, kind = places[name]
        expected = (rank, site.in_features) if kind is TensorKind.LORA_A else (site.out_features, rank)
        yield TensorKey(site.index, kind), _array(name, tensor, expected)


def _array(name: str, tensor: Mapping[str, Any], expected: tuple[int, int]) -> NDArray[Any]:
    if tuple(tensor["shape"]) != expected:
        raise _invalid(
            WEIGHTS_FILE, f"tensor {name!r} expects shape {expected}, got {tuple(tensor['shape'])}"
        )
    values = _decode(name, tensor["dtype"], tensor["data"]).reshape(expected)
    if not np.isfinite(values).all():
        raise _invalid(WEIGHTS_FILE, f"tensor {name!r} holds values that are not finite")
    return values


def _decode(name: str, dtype: str, data: bytes) -> NDArray[Any]:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return np.frombuffer(data, "<f2").astype(np.float32)
    if dtype in ("F32", "F64"):
        return np.frombuffer(data, "<f4" if dtype == "F32" else "<f8").copy()
    raise _invalid(WEIGHTS_FILE, f"tensor {name!r} expects a float type, got {dtype}")


def _check_pairs(weights: Mapping[TensorKey, NDArray[Any]], catalogue: Sequence[Site]) -> None:
    if not weights:
        raise _invalid(WEIGHTS_FILE, "holds no tensors")
    for site in catalogue:
        present = [kind.name for kind in _SUFFIXES if TensorKey(site.index, kind) in weights]
        if len(present) == 1:
            raise _invalid(WEIGHTS_FILE, f"site {site.name!r} has {present[0]} only, it needs both factors")


def _file(files: Mapping[str, bytes], name: str) -> bytes:
    if name not in files:
        raise _invalid(name, f"is missing; the folder holds: {', '.join(sorted(files)) or 'nothing'}")
    return files[name]


def _invalid(file: str, message: str) -> InvalidInput:
    return InvalidInput(
        "ADAPTER_FILE_INVALID",
        f"{file} {message}",
        where=file,
        remedy="Give a PEFT folder of a plain LoRA adapter made for this base model.",
    )
