"""What compression costs: one step's gradient and a short training, with it and without, in one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cola_runtime.adapter_spec import AdapterKind, AdapterPart, AdapterSpec
from cola_runtime.adapters.checkpoint_format import TrainingDefinition
from cola_runtime.base_model.model import TappedModel
from cola_runtime.device.session import AdapterSession
from cola_runtime.encodings import TapPlan
from cola_runtime.gradients.accumulate import GradientAccumulator
from cola_runtime.gradients.compression import Compressed, Int8Blocks, TapCompressor, dequantized
from cola_runtime.gradients.taps import Tap, TapSink
from cola_runtime.rows import Row
from cola_runtime.types import (
    BaseStep,
    LearningRateSchedule,
    Lease,
    OptimizerHyperparameters,
    Segment,
    TensorKey,
)

STEPS = 50
LEASE = Lease(job_id="job-" + "0" * 32, epoch=1, device_id="here")
_ROWS, _ROWS_PER_STEP = 16, 4

Weights = Mapping[TensorKey, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Against the same without compression."""

    gradient: float  # |difference| / |gradient| of the first step, over the whole adapter
    weights: float  # |difference| / |way from the initial weights| after STEPS steps of AdamW
    loss: float  # sum over the rows after STEPS steps, with compression
    exact_loss: float  # and without
    first_loss: float  # before training


def compression_cost(path: Path, kind: AdapterKind, taps: TapPlan) -> Cost:
    """Of an adapter of this kind at every site of the float32 model in `path`, on random rows."""
    model = TappedModel.load(path, dtype="float32", attention="eager")
    spec = AdapterSpec(parts=(AdapterPart(kind=kind, sites=model.sites),), seed=0)
    rows = _random_rows()
    exact = _Run(model, spec, TapPlan(taps.encoding, taps.exceptions), rows)
    lossy = _Run(model, spec, taps, rows)
    start = exact.session.weights()
    first_loss = exact.loss()
    gradients = [run.gradient() for run in (lossy, exact)]
    for run in (lossy, exact):
        run.train()
    ends = [run.session.weights() for run in (lossy, exact)]
    return Cost(
        gradient=_distance(*gradients) / _norm(gradients[1]),
        weights=_distance(*ends) / _distance(start, ends[1]),
        loss=lossy.loss(),
        exact_loss=exact.loss(),
        first_loss=first_loss,
    )


def decoded(compressed: Compressed, dtype: torch.dtype) -> Tensor:
    """What the device makes of a tensor that came compressed."""
    return dequantized(compressed, dtype) if isinstance(compressed, Int8Blocks) else compressed


class _Run:
    """One adapter between a base model and a device, without a wire."""

    def __init__(self, model: TappedModel, spec: AdapterSpec, taps: TapPlan, rows: tuple[Row, ...]) -> None:
        self._model, self._taps, self._rows = model, taps, rows
        optimizer = OptimizerHyperparameters(kind="adamw", learning_rate=2e-3)
        schedule = LearningRateSchedule(kind="constant", warmup_steps=0, total_steps=STEPS)
        self.session = AdapterSession.create(
            TrainingDefinition(spec=spec, optimizer=optimizer, schedule=schedule)
        )

    def gradient(self) -> Weights:
        """Of the first step, by an accumulator and a compressor of its own."""
        accumulator = GradientAccumulator(self.session.definition.spec)
        weights = self.session.weights()
        compressor = TapCompressor()

        def sink(tap: Tap) -> None:
            for key, tensor in compressor.compress(LEASE, self._taps.compression, tap.tensors).items():
                accumulator.add(key, decoded(tensor, self.session.dtype), weights)

        self._compute(self._rows[:_ROWS_PER_STEP], sink)
        return accumulator.gradients()

    def train(self) -> None:
        compressor = TapCompressor()

        def sink(tap: Tap) -> None:
            for key, tensor in compressor.compress(LEASE, self._taps.compression, tap.tensors).items():
                self.session.add(key, decoded(tensor, self.session.dtype), version=self.session.version)

        for step in range(STEPS):
            first = step * _ROWS_PER_STEP % _ROWS
            self._compute(self._rows[first : first + _ROWS_PER_STEP], sink)
            self.session.apply(version=step)

    def loss(self) -> float:
        return self._compute(self._rows, None)

    def _compute(self, rows: tuple[Row, ...], sink: TapSink | None) -> float:
        version = self.session.version
        self._model.install(LEASE, self.session.definition.spec, version, self.session.weights())
        denominator = float(sum(float(row.weights.sum()) for row in rows))
        segment = Segment(
            lease=LEASE, version=version, rows=rows, loss_denominator=denominator, taps=self._taps
        )
        step = BaseStep(number=0, segments=(segment,), train=sink is not None)
        return self._model.run(step, sink or _nowhere).losses[0].loss_sum


def _nowhere(tap: Tap) -> None:
    """A step that does not train hands out nothing."""


def _random_rows() -> tuple[Row, ...]:
    draw = np.random.default_rng(0)
    rows = []
    for length in draw.integers(20, 40, _ROWS):
        weights = np.ones(length, np.float32)
        weights[0] = 0.0
        rows.append(Row(tokens=draw.integers(5, 250, length, dtype=np.int32), weights=weights))
    return tuple(rows)


def _distance(left: Weights, right: Weights) -> float:
    return _norm({key: left[key] - tensor for key, tensor in right.items()})


def _norm(tensors: Weights) -> float:
    return float(
        torch.linalg.vector_norm(torch.cat([tensor.double().reshape(-1) for tensor in tensors.values()]))
    )
