"""An exported adapter: a PEFT folder where PEFT has its kinds, a cola folder where it has not. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from cola_runtime.adapter_spec import AdapterSpec
from cola_runtime.adapters.cola_files import FORMAT, cola_folder, read_cola_folder
from cola_runtime.adapters.folder_files import CONFIG_FILE, AdapterFolder, invalid, read_config
from cola_runtime.adapters.peft_files import fits_peft, peft_folder, read_peft_folder
from cola_runtime.adapters.shapes import weight_names
from cola_runtime.job_choices import Task
from cola_runtime.types import Site, TensorKey

PEFT_TASKS: dict[str, str] = {
    Task.CAUSAL_LM: "CAUSAL_LM",
    Task.SEQUENCE_TO_SEQUENCE: "SEQ_2_SEQ_LM",
}
"""peft's words; none for a task with a head, which is not in peft's file."""
HEAD_FILE = "head.safetensors"  # a task's head, tensors `score/weight` and `score/bias`


def adapter_folder(
    spec: AdapterSpec,
    weights: Mapping[TensorKey, NDArray[Any]],
    base_model: str,
    *,
    task: str = Task.CAUSAL_LM,
) -> dict[str, bytes]:
    """File name -> content; LoRA and linearized LoRA, alone or mixed, make a PEFT folder.

    `task` is the job's, by which the folder tells peft what to load it for. A task's head has a file of its
    own, for it is at no module of the base model; the rest then loads onto transformers' classification
    model of it.
    """
    files: dict[str, bytes] = {}
    body = spec.body
    if body is not None and fits_peft(body):
        files |= peft_folder(body, weights, base_model, task_type=None if spec.head else PEFT_TASKS[task])
    elif body is not None:
        files |= cola_folder(body, weights, base_model)
    if spec.head is not None:
        index, names = spec.head[1].index, weight_names(spec)
        head = {name: np.ascontiguousarray(weights[key]) for key, name in names.items() if key.site == index}
        files[HEAD_FILE] = safetensors.numpy.save(head, metadata={"format": "pt"})
    return files


def read_adapter_folder(files: Mapping[str, bytes], catalogue: Sequence[Site]) -> AdapterFolder:
    """The adapter in a folder of either format, completely checked against the base model's sites.

    Raises InvalidInput `ADAPTER_FILE_INVALID` with file and tensor, or `ADAPTER_MODULE_UNKNOWN`.
    """
    config = read_config(files)
    if "peft_type" in config:
        return read_peft_folder(files, catalogue)
    if config.get("format") == FORMAT:
        return read_cola_folder(files, catalogue)
    raise invalid(CONFIG_FILE, f"says neither a peft_type nor format {FORMAT}")
