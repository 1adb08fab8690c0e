"""Adapters of every kind with trained-looking weights, and folders of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cola_runtime.adapter_spec import (
    AdapterKind,
    AdapterPart,
    AdapterSpec,
    LinearizedLoraKind,
    LinearKind,
    LoraKind,
    MlpKind,
    ModuleKind,
)
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.types import Site, TensorKey

LORA = LoraKind(rank=3, alpha=5.0)
MODULE = ModuleKind(name="bent", options=(("width", 3),), scaling=0.7)
KINDS: dict[str, AdapterKind] = {
    "lora": LORA,
    "rslora": LoraKind(rank=4, alpha=2.5, use_rslora=True),
    "linearized-zero": LinearizedLoraKind(rank=3, alpha=6.0, initial_b="zero", base_seed=9),
    "linearized-random": LinearizedLoraKind(rank=2, alpha=5.0),
    "linearized-rslora": LinearizedLoraKind(rank=3, alpha=5.0, use_rslora=True),
    "linear": LinearKind(scaling=0.5),
    "linear-bias": LinearKind(bias=True, scaling=2.0),
    "mlp-relu": MlpKind(hidden=7, activation="relu", scaling=1.5),
    "mlp-gelu": MlpKind(hidden=5, activation="gelu"),
    "module": MODULE,
}


class Bent(nn.Module):
    """A module that accepts [N, in] only, so that whoever uses it must flatten."""

    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(inputs, width), nn.Linear(width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, _ = x.shape
        assert rows
        return self.up(torch.sin(self.down(x)))


def bent(inputs: int, outputs: int, options: Mapping[str, Any]) -> nn.Module:
    return Bent(inputs, outputs, int(options["width"]))


def spec_of(*parts: tuple[AdapterKind, tuple[Site, ...]], dtype: str = "float64") -> AdapterSpec:
    return AdapterSpec(
        parts=tuple(AdapterPart(kind=kind, sites=sites) for kind, sites in parts), seed=4, dtype=dtype
    )


def trained_weights(spec: AdapterSpec) -> dict[TensorKey, NDArray[Any]]:
    """Nowhere near zero."""
    draw = np.random.default_rng(3)
    return {
        key: (weight.numpy() + 0.2 * draw.normal(size=tuple(weight.shape))).astype(spec.dtype)
        for key, weight in initial_weights(spec).items()
    }


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
