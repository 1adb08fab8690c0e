"""The two files of an exported adapter, whatever its format, and what is checked of both. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from cola_runtime.adapter_spec import AdapterSpec
from cola_runtime.errors import InvalidInput
from cola_runtime.types import TensorKey

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFolder:
    """What a folder holds. Every weight of `spec` is there, in its shape and its dtype, and finite."""

    spec: AdapterSpec
    weights: dict[TensorKey, NDArray[Any]]
    base_model: str  # the name that the folder gives; empty if it gives none


def folder_files(config: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> dict[str, bytes]:
    """File name -> content."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return {
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
        WEIGHTS_FILE: safetensors.numpy.save(contiguous, metadata={"format": "pt"}),
    }


def read_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    """adapter_config.json's object. Raises InvalidInput ADAPTER_FILE_INVALID."""
    try:
        config = json.loads(_file(files, CONFIG_FILE))
    except (ValueError, RecursionError) as error:
        raise invalid(CONFIG_FILE, f"is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise invalid(CONFIG_FILE, "is not an object")
    return config


def base_model_name(config: Mapping[str, Any]) -> str:
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) else ""


class TensorFile:
    """adapter_model.safetensors, each tensor decoded when it is asked for. Raises ADAPTER_FILE_INVALID."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        try:
            tensors = safetensors.deserialize(_file(files, WEIGHTS_FILE))  # type: ignore[no-untyped-call]
        except safetensors.SafetensorError as error:
            raise invalid(WEIGHTS_FILE, f"is not safetensors: {error}") from error
        self._tensors: dict[str, dict[str, Any]] = dict(tensors)
        if not self._tensors:
            raise invalid(WEIGHTS_FILE, "holds no tensors")

    @property
    def names(self) -> list[str]:
        """Sorted, so that the first wrong tensor that is named is always the same one."""
        return sorted(self._tensors)

    @property
    def is_double(self) -> bool:
        return any(tensor["dtype"] == "F64" for tensor in self._tensors.values())

    def array(self, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """The tensor, widened to `dtype` without loss, if it has this shape and only finite values."""
        tensor = self._tensors[name]
        if tuple(tensor["shape"]) != shape:
            raise invalid(
                WEIGHTS_FILE, f"tensor {name!r} expects shape {shape}, got {tuple(tensor['shape'])}"
            )
        values = _decoded(name, tensor["dtype"], tensor["data"]).reshape(shape)
        if not np.can_cast(values.dtype, dtype):
            raise invalid(WEIGHTS_FILE, f"tensor {name!r} expects {dtype}, got {values.dtype}")
        if not np.isfinite(values).all():
            raise invalid(WEIGHTS_FILE, f"tensor {name!r} holds values that are not finite")
        return values.astype(dtype)


def _decoded(name: str, dtype: str, data: bytes) -> NDArray[Any]:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype not in _DTYPES:
        raise invalid(WEIGHTS_FILE, f"tensor {name!r} expects a float type, got {dtype}")
    return np.frombuffer(data, _DTYPES[dtype])


def _file(files: Mapping[str, bytes], name: str) -> bytes:
    if name not in files:
        raise invalid(name, f"is missing; the folder holds: {', '.join(sorted(files)) or 'nothing'}")
    return files[name]


def invalid(file: str, message: str) -> InvalidInput:
    """ADAPTER_FILE_INVALID, with the file and what is wrong in it."""
    return InvalidInput(
        "ADAPTER_FILE_INVALID",
        f"{file} {message}",
        where=file,
        remedy="Give a PEFT folder of a plain LoRA, or one that `cola adapters export` wrote, "
        "made for this base model.",
    )
