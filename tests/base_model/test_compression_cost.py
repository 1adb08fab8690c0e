"""The errors that docs/encodings.md names hold for a first gradient and for 50 steps of training."""

from __future__ import annotations

import pytest

from cola_runtime.adapter_spec import AdapterKind, LinearKind, LoraKind
from cola_runtime.encodings import Compression, Encoding, TapPlan
from cola_runtime.testing.lossy import compression_cost
from tests.base_model.conftest import TinyFolder

BFLOAT16, INT8, LOW_RANK = Compression.BFLOAT16, Compression.INT8, Compression.LOW_RANK


@pytest.mark.parametrize(
    ("kind", "encoding", "compression", "gradient", "weights", "loss"),
    [
        (LoraKind(), Encoding.ADAPTER_GRADIENT, Compression.NONE, 0.0, 0.0, 0.0),
        (LoraKind(), Encoding.ADAPTER_GRADIENT, BFLOAT16, 0.0025, 0.02, 0.001),
        (LoraKind(), Encoding.ADAPTER_GRADIENT, INT8, 0.01, 0.04, 0.003),
        (LoraKind(), Encoding.ACTIVATIONS, INT8, 0.013, 0.04, 0.003),
        (LinearKind(), Encoding.WEIGHT_GRADIENT, BFLOAT16, 0.0025, 0.02, 0.003),
        (LinearKind(), Encoding.WEIGHT_GRADIENT, INT8, 0.012, 0.04, 0.01),
        (LinearKind(), Encoding.WEIGHT_GRADIENT, LOW_RANK, 0.7, 0.5, 0.3),
    ],
)
def test_a_compressed_job_stays_within_the_stated_error(
    tiny_folder: TinyFolder,
    kind: AdapterKind,
    encoding: Encoding,
    compression: Compression,
    gradient: float,
    weights: float,
    loss: float,
) -> None:
    plan = TapPlan(encoding, compression=compression)
    cost = compression_cost(tiny_folder("llama", "float32"), kind, plan)
    lossless = compression is Compression.NONE
    assert (cost.gradient > 0) is not lossless  # something was compressed
    assert cost.gradient <= gradient
    assert cost.weights <= weights
    assert abs(cost.loss / cost.exact_loss - 1) <= loss
    assert cost.loss < 0.7 * cost.first_loss
