"""The axes of the matrix, and why some cells are empty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cola_runtime.encodings import Encoding
from cola_runtime.job_choices import Task
from tests.base_model.kind_samples import KINDS, NONLINEAR

MODES = ("unmerged", "merged")

# Where transformers computes parts in float32 whatever the model's type (Qwen's and T5's norms, an eager
# softmax), the reference is its own code, so that both sides round alike.
CAUSAL = ("gpt2", "llama", "qwen2", "opt", "gpt_neox", "phi3")
LABELLED = ("bert", "roberta", "gpt2", "llama")
SOURCED = ("t5", "bart", "mt5", "marian")
PICTURED = ("vit", "dinov2", "convnext")
SETTINGS: tuple[tuple[str, Task], ...] = (
    *((architecture, Task.CAUSAL_LM) for architecture in CAUSAL),
    *((architecture, Task.SEQUENCE_CLASSIFICATION) for architecture in LABELLED),
    *((architecture, Task.REGRESSION) for architecture in LABELLED),
    *((architecture, Task.SEQUENCE_TO_SEQUENCE) for architecture in SOURCED),
    *((architecture, Task.IMAGE_CLASSIFICATION) for architecture in PICTURED),
)
_QUICK = frozenset(
    {
        ("gpt2", Task.CAUSAL_LM),
        ("llama", Task.CAUSAL_LM),
        ("bert", Task.SEQUENCE_CLASSIFICATION),
        ("t5", Task.SEQUENCE_TO_SEQUENCE),
        ("vit", Task.IMAGE_CLASSIFICATION),
    }
)


def is_quick(parameters: Mapping[str, Any]) -> bool:
    """What every run of the tests takes; `make matrix` takes all."""
    if "dtype" in parameters:
        place = parameters["architecture"], parameters["task"]
        return place in _QUICK and parameters["dtype"] == "float64"
    shortest = ("gpt2", "unmerged", Encoding.ADAPTER_GRADIENT)  # of the trajectories
    return (parameters["architecture"], parameters["mode"], parameters["encoding"]) == shortest


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    architecture: str
    task: str
    mode: str
    encoding: str
    kind: str


def cells(architecture: str, task: Task, mode: str, encoding: Encoding) -> dict[Cell, str | None]:
    """Every kind's cell, and why it is empty, or None."""
    return {
        Cell(architecture, task.value, mode, encoding.value, kind): empty_because(kind, mode, encoding)
        for kind in KINDS
    }


def empty_because(kind: str, mode: str, encoding: Encoding) -> str | None:
    if kind in NONLINEAR and mode == "merged":
        return "not linear in x: refused in merged mode (MERGED_NEEDS_LINEAR)"
    if kind in NONLINEAR and encoding is Encoding.WEIGHT_GRADIENT:
        return "not linear in x: G does not determine its gradient (ENCODING_UNSUPPORTED)"
    return None
