"""A checkpoint as one bytes object: safetensors with the adapter's definition as JSON metadata. Torch-free.

Tensor names: `weights/<site name>/lora_a`, `optimizer/<site name>/lora_a/<state name>`, the same for every
weight; the state names are torch.optim's own (adapters/optimizer_state.py). Metadata "cola" holds format,
spec, optimizer, schedule and version. Reading checks everything against them before a tensor is used.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from cola_runtime.adapter_spec import AdapterSpec, adapter_spec_from_fields
from cola_runtime.adapters.optimizer_state import STEP, state_shapes
from cola_runtime.adapters.shapes import weight_names, weight_shapes
from cola_runtime.errors import InvalidInput
from cola_runtime.spec import MAX_INNER_STEPS
from cola_runtime.types import LearningRateSchedule, OptimizerHyperparameters, TensorKey

FORMAT = 2
MAX_HEADER_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingDefinition:
    """What fixes an adapter's training, apart from its rows."""

    spec: AdapterSpec
    optimizer: OptimizerHyperparameters
    schedule: LearningRateSchedule


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointContent:
    """A checkpoint, decoded and checked: every weight, and the optimizer's state of each (maybe none yet)."""

    definition: TrainingDefinition
    version: int
    weights: dict[TensorKey, NDArray[Any]]
    optimizer_state: dict[TensorKey, dict[str, NDArray[Any]]]


def encode_checkpoint(content: CheckpointContent) -> bytes:
    """The checkpoint's bytes; equal content gives equal bytes."""
    tensors: dict[str, NDArray[Any]] = {}
    for key, name in weight_names(content.definition.spec).items():
        tensors[f"weights/{name}"] = np.ascontiguousarray(content.weights[key])
        for state, value in content.optimizer_state.get(key, {}).items():
            tensors[f"optimizer/{name}/{state}"] = np.array(value, order="C")
    definition = content.definition
    description = {
        "format": FORMAT,
        "version": content.version,
        "spec": definition.spec.model_dump(mode="json"),
        "optimizer": dataclasses.asdict(definition.optimizer),
        "schedule": dataclasses.asdict(definition.schedule),
    }
    return safetensors.numpy.save(tensors, metadata={"cola": json.dumps(description, sort_keys=True)})


def decode_checkpoint(data: bytes) -> CheckpointContent:
    """Inverse of `encode_checkpoint`. Raises InvalidInput CHECKPOINT_INVALID for what does not fit."""
    try:
        description = _description(data)
        definition, version = _definition(description), int(description["version"])
        tensors = safetensors.numpy.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, struct.error) as error:
        raise _invalid(f"it cannot be read: {error}") from error
    return _checked(definition, version, tensors)


def checkpoint_weights(data: bytes) -> tuple[AdapterSpec, int, dict[TensorKey, NDArray[Any]]]:
    """The adapter of a checkpoint: what it is, its version, its weights."""
    content = decode_checkpoint(data)
    return content.definition.spec, content.version, content.weights


def _description(data: bytes) -> dict[str, Any]:
    (header_bytes,) = struct.unpack_from("<Q", data)
    if header_bytes > min(MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError(f"a header of {header_bytes} bytes in {len(data)} bytes")
    description = json.loads(json.loads(data[8 : 8 + header_bytes])["__metadata__"]["cola"])
    if not isinstance(description, dict) or description["format"] != FORMAT:
        raise ValueError(f"checkpoint format {description['format']!r}, this release reads {FORMAT}")
    return description


def _definition(description: dict[str, Any]) -> TrainingDefinition:
    optimizer = dict(description["optimizer"])
    optimizer["betas"] = tuple(optimizer["betas"])
    if optimizer.get("inner_steps", 1) not in range(1, MAX_INNER_STEPS + 1):
        raise ValueError(f"inner_steps {optimizer['inner_steps']!r}")
    return TrainingDefinition(
        spec=adapter_spec_from_fields(description["spec"]),
        optimizer=OptimizerHyperparameters(**optimizer),
        schedule=LearningRateSchedule(**description["schedule"]),
    )


def _checked(
    definition: TrainingDefinition, version: int, tensors: dict[str, NDArray[Any]]
) -> CheckpointContent:
    if version < 0:
        raise _invalid(f"version {version}")
    weights: dict[TensorKey, NDArray[Any]] = {}
    states: dict[TensorKey, dict[str, NDArray[Any]]] = {}
    names = weight_names(definition.spec)
    for key, shape in weight_shapes(definition.spec).items():
        dtype = definition.spec.dtype
        weights[key] = _take(tensors, f"weights/{names[key]}", shape=shape, dtype=dtype)
        expected = state_shapes(definition.optimizer, shape) if version else {}
        states[key] = {
            state: _take(
                tensors,
                f"optimizer/{names[key]}/{state}",
                shape=state_shape,
                dtype="float32" if state == STEP else dtype,
            )
            for state, state_shape in expected.items()
        }
        _check_count(states[key], version * definition.optimizer.inner_steps)
    if tensors:
        raise _invalid(f"unknown tensors {sorted(tensors)[:3]}")
    return CheckpointContent(definition=definition, version=version, weights=weights, optimizer_state=states)


def _check_count(state: dict[str, NDArray[Any]], steps: int) -> None:
    steps = min(steps, 2**24)  # torch counts in float32, which 2^24 + 1 leaves at 2^24
    if state.get(STEP, steps) != steps:
        raise _invalid(f"the optimizer counts {state[STEP]} steps where it has taken {steps}")


def _take(tensors: dict[str, NDArray[Any]], name: str, *, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise _invalid(f"tensor {name!r} is missing")
    if tensor.shape != shape or tensor.dtype != dtype or not np.isfinite(tensor).all():
        raise _invalid(f"tensor {name!r} is {tensor.dtype} {tensor.shape}, expected finite {dtype} {shape}")
    return tensor


def _invalid(problem: str) -> InvalidInput:
    return InvalidInput(
        "CHECKPOINT_INVALID", f"not a checkpoint of an adapter: {problem}", remedy="Use an older checkpoint."
    )
