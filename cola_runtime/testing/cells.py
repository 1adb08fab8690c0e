"""Results of a long benchmark, one JSON file a cell: kept as soon as they are there, made once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from cola_runtime.types import TensorKey, TensorKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A cell's file name, and everything that its result depends on, as JSON has it."""

    name: str
    configuration: dict[str, Any]


class Cells:
    """The cells in a folder. A result counts only for the configuration that it was made with."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's result, or None if it is missing or was made with another configuration."""
        path = self._folder / f"{cell.name}.json"
        if not path.is_file():
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        same = kept["configuration"] == json.loads(json.dumps(cell.configuration))
        result: dict[str, Any] | None = kept["result"] if same else None
        return result

    def keep(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Whole or not at all, whenever the process ends."""
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"configuration": cell.configuration, "result": result}, indent=1)
        staging = self._folder / f"{cell.name}.json.new"
        staging.write_text(text + "\n", encoding="utf-8")
        os.replace(staging, self._folder / f"{cell.name}.json")

    def clear(self) -> None:
        """Forget every cell."""
        for path in self._folder.glob("*.*"):
            path.unlink()

    def keep_weights(self, name: str, weights: Mapping[TensorKey, Tensor]) -> None:
        """An adapter beside a cell; before `keep`, so that a cell that is there has it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        named = {
            f"{key.site}.{int(key.kind)}.{key.slot}": value.contiguous() for key, value in weights.items()
        }
        safetensors.torch.save_file(named, self._folder / f"{name}.safetensors")

    def weights(self, name: str) -> dict[TensorKey, Tensor]:
        loaded = safetensors.torch.load_file(self._folder / f"{name}.safetensors")
        keys = {each: [int(number) for number in each.split(".")] for each in loaded}
        return {
            TensorKey(site, TensorKind(kind), slot): loaded[each] for each, (site, kind, slot) in keys.items()
        }
