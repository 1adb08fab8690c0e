"""A checkpoint as one bytes object: safetensors with the adapter's definition as JSON metadata. Torch-free.

Tensors: `weights`, all of them one behind the other in catalogue order, and `optimizer/<state name>`, that
state of every weight which has one, in the same order; the state names are torch.optim's own
(adapters/optimizer_state.py). Metadata "cola" holds format, spec, optimizer, schedule and version. Reading
checks everything against them before a tensor is used, and copies nothing.

Format 2, of the releases before, had a tensor for each weight and each of its states; it is read, too.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cola_runtime.adapter_spec import AdapterSpec, adapter_spec_from_fields
from cola_runtime.adapters.optimizer_state import STEP, state_layout
from cola_runtime.adapters.shapes import Shape, weight_names, weight_shapes
from cola_runtime.adapters.tensor_views import read_tensors, write_tensors
from cola_runtime.errors import InvalidInput
from cola_runtime.spec import MAX_INNER_STEPS
from cola_runtime.types import LearningRateSchedule, OptimizerHyperparameters, TensorKey

FORMAT = 3
TENSOR_BY_TENSOR = 2
_WEIGHTS = "weights"

Vector = NDArray[Any]
Encoded = bytes | memoryview
"""A checkpoint's bytes; what a device sent lies in a buffer of its own."""


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
    weights_P: Vector
    states: dict[str, Vector]
    """State name -> that of every weight which has one, one behind the other in catalogue order."""

    @staticmethod
    def of(
        definition: TrainingDefinition,
        version: int,
        weights: Mapping[TensorKey, Vector],
        optimizer_state: Mapping[TensorKey, Mapping[str, Vector]],
    ) -> CheckpointContent:
        """From each weight's own tensors; those of all weights, or no state at all."""
        shapes = weight_shapes(definition.spec)
        layout = state_layout(definition.optimizer, shapes) if any(optimizer_state.values()) else {}
        return CheckpointContent(
            definition=definition,
            version=version,
            weights_P=_joined([weights[key] for key in shapes]),
            states={
                name: _joined([optimizer_state[key][name] for key in of_state])
                for name, of_state in layout.items()
            },
        )

    @property
    def weights(self) -> dict[TensorKey, Vector]:
        """Each in its shape, as views."""
        return _views(self.weights_P, weight_shapes(self.definition.spec))

    @property
    def optimizer_state(self) -> dict[TensorKey, dict[str, Vector]]:
        """Of each weight, as views."""
        shapes = weight_shapes(self.definition.spec)
        found: dict[TensorKey, dict[str, Vector]] = {key: {} for key in shapes}
        if self.states:
            for name, of_state in state_layout(self.definition.optimizer, shapes).items():
                for key, state in _views(self.states[name], of_state).items():
                    found[key][name] = state
        return found


def encode_checkpoint(content: CheckpointContent) -> bytes:
    """The checkpoint's bytes; equal content gives equal bytes."""
    definition = content.definition
    description = {
        "format": FORMAT,
        "version": content.version,
        "spec": definition.spec.model_dump(mode="json"),
        "optimizer": dataclasses.asdict(definition.optimizer),
        "schedule": dataclasses.asdict(definition.schedule),
    }
    states = {_state_name(name): content.states[name] for name in sorted(content.states)}
    metadata = {"cola": json.dumps(description, sort_keys=True)}
    return write_tensors({_WEIGHTS: content.weights_P, **states}, metadata)


def decode_checkpoint(data: Encoded) -> CheckpointContent:
    """Inverse of `encode_checkpoint`; its vectors are views of `data`.

    Raises InvalidInput CHECKPOINT_INVALID for what does not fit.
    """
    try:
        metadata, tensors = read_tensors(data)
        description = json.loads(metadata["cola"])
        if not isinstance(description, dict) or description["format"] not in (FORMAT, TENSOR_BY_TENSOR):
            raise ValueError(f"a checkpoint format that is not {FORMAT} or {TENSOR_BY_TENSOR}")
        definition, version = _definition(description), int(description["version"])
        if version < 0:
            raise _invalid(f"version {version}")
        if description["format"] == TENSOR_BY_TENSOR:
            tensors = _as_vectors(definition, version, tensors)
        return _checked(definition, version, tensors)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise _invalid(f"it cannot be read: {error}") from error


def checkpoint_weights(data: Encoded) -> tuple[AdapterSpec, int, dict[TensorKey, Vector]]:
    """The adapter of a checkpoint: what it is, its version, its weights."""
    content = decode_checkpoint(data)
    return content.definition.spec, content.version, content.weights


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


def _checked(definition: TrainingDefinition, version: int, tensors: dict[str, Vector]) -> CheckpointContent:
    shapes, dtype = weight_shapes(definition.spec), definition.spec.dtype
    weights_P = _take(tensors, _WEIGHTS, numel=_numel(shapes), dtype=dtype)
    layout = state_layout(definition.optimizer, shapes) if version else {}
    states = {
        name: _take(
            tensors, _state_name(name), numel=_numel(of_state), dtype="float32" if name == STEP else dtype
        )
        for name, of_state in layout.items()
    }
    if tensors:
        raise _invalid(f"unknown tensors {sorted(tensors)[:3]}")
    _check_count(states, version * definition.optimizer.inner_steps)
    return CheckpointContent(definition=definition, version=version, weights_P=weights_P, states=states)


def _check_count(states: dict[str, Vector], steps: int) -> None:
    steps = min(steps, 2**24)  # torch counts in float32, which 2^24 + 1 leaves at 2^24
    counts = states.get(STEP)
    if counts is not None and (counts != steps).any():
        raise _invalid(f"the optimizer counts {counts[counts != steps][0]} steps where it has taken {steps}")


def _take(tensors: dict[str, Vector], name: str, *, numel: int, dtype: str) -> Vector:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise _invalid(f"tensor {name!r} is missing")
    if tensor.shape != (numel,) or tensor.dtype != dtype or not _finite(tensor):
        raise _invalid(
            f"tensor {name!r} is {tensor.dtype} {tensor.shape}, expected finite {dtype} {(numel,)}"
        )
    return tensor


def _finite(vector: Vector) -> bool:
    """Least and greatest tell: a NaN is both. Without a byte of memory for each number."""
    return bool(np.isfinite(vector.min()) and np.isfinite(vector.max()))


def _as_vectors(
    definition: TrainingDefinition, version: int, tensors: dict[str, Vector]
) -> dict[str, Vector]:
    """What format 2 has, as format 3 has it."""
    shapes, names = weight_shapes(definition.spec), weight_names(definition.spec)
    layout = state_layout(definition.optimizer, shapes) if version else {}

    def joined(expected: Mapping[TensorKey, Shape], name_of: Mapping[TensorKey, str]) -> Vector:
        parts = [tensors.pop(name_of[key], None) for key in expected]
        for key, part in zip(expected, parts, strict=True):
            if part is None:
                raise _invalid(f"tensor {name_of[key]!r} is missing")
            if part.shape != expected[key] or part.dtype != parts[0].dtype:  # type: ignore[union-attr]
                raise _invalid(f"tensor {name_of[key]!r} is {part.dtype} {part.shape}, not {expected[key]}")
        return _joined([part for part in parts if part is not None])

    vectors = {_WEIGHTS: joined(shapes, {key: f"weights/{name}" for key, name in names.items()})}
    for state, of_state in layout.items():
        name_of = {key: f"optimizer/{names[key]}/{state}" for key in of_state}
        vectors[_state_name(state)] = joined(of_state, name_of)
    return vectors | tensors  # what is left is nobody's


def _state_name(name: str) -> str:
    return f"optimizer/{name}"


def _joined(tensors: list[Vector]) -> Vector:
    return np.concatenate([np.asarray(tensor).reshape(-1) for tensor in tensors])


def _numel(shapes: Mapping[TensorKey, Shape]) -> int:
    return sum(map(prod, shapes.values()))


def _views(vector: Vector, shapes: Mapping[TensorKey, Shape]) -> dict[TensorKey, Vector]:
    starts = accumulate(map(prod, shapes.values()), initial=0)
    return {
        key: vector[start : start + prod(shape)].reshape(shape)
        for (key, shape), start in zip(shapes.items(), starts, strict=False)
    }


def _invalid(problem: str) -> InvalidInput:
    return InvalidInput(
        "CHECKPOINT_INVALID", f"not a checkpoint of an adapter: {problem}", remedy="Use an older checkpoint."
    )
