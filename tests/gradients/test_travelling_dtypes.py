"""Which gradients may travel in the base model's bfloat16."""

from __future__ import annotations

import pytest

from cola_runtime.adapter_spec import (
    AdapterKind,
    HeadKind,
    LinearizedLoraKind,
    LinearKind,
    LoraKind,
    MlpKind,
    ModuleKind,
)
from cola_runtime.encodings import Compression, Encoding
from cola_runtime.gradients.planner import Workload, travelling_dtype


def travels(
    kind: AdapterKind,
    encoding: Encoding = Encoding.ADAPTER_GRADIENT,
    *,
    base: str = "bfloat16",
    loss_scaled: bool = False,
    compression: Compression = Compression.NONE,
) -> str:
    workload = Workload(tokens=10, microbatches=1, base_dtype=base, loss_scaled=loss_scaled)
    adapter = "float64" if base == "float64" else "float32"
    return travelling_dtype(kind, encoding, workload, dtype=adapter, compression=compression)


@pytest.mark.parametrize(
    "kind",
    [
        LoraKind(rank=8, alpha=16.0),
        LoraKind(rank=16, alpha=8.0),
        LoraKind(rank=8, dropout=0.1),
        LinearizedLoraKind(rank=4, alpha=4.0),
        LinearKind(),
        MlpKind(scaling=0.25),
    ],
)
def test_a_power_of_two_leaves_a_gradient_in_the_base_models_bfloat16(kind: AdapterKind) -> None:
    assert travels(kind) == "bfloat16"


@pytest.mark.parametrize(
    "kind",
    [
        LoraKind(rank=8, alpha=12.0),
        LoraKind(rank=8, use_rslora=True),
        LinearKind(scaling=0.7),
        MlpKind(scaling=3.0),
        HeadKind(labels=2),
        ModuleKind(name="anything"),
    ],
)
def test_another_scaling_and_what_is_not_made_in_bfloat16_travel_in_the_adapters(kind: AdapterKind) -> None:
    assert travels(kind) == "float32"


def test_a_product_has_no_scaling_in_it() -> None:
    assert travels(LoraKind(rank=8, alpha=12.0), Encoding.WEIGHT_GRADIENT) == "bfloat16"
    low_rank = Compression.LOW_RANK
    assert travels(LinearKind(), Encoding.WEIGHT_GRADIENT, compression=low_rank) == "float32"


@pytest.mark.parametrize("base", ["float16", "float32", "float64"])
@pytest.mark.parametrize("encoding", [Encoding.ADAPTER_GRADIENT, Encoding.WEIGHT_GRADIENT])
def test_over_any_other_base_model_gradients_are_in_the_adapters_dtype(base: str, encoding: Encoding) -> None:
    assert travels(LoraKind(), encoding, base=base) == ("float64" if base == "float64" else "float32")


@pytest.mark.parametrize("encoding", [Encoding.ADAPTER_GRADIENT, Encoding.WEIGHT_GRADIENT])
def test_what_was_under_a_loss_scale_leaves_in_the_adapters_dtype(encoding: Encoding) -> None:
    assert travels(LoraKind(), encoding, loss_scaled=True) == "float32"
