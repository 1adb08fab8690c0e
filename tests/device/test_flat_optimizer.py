"""One vector per adapter steps bit for bit as torch.optim does on the separate tensors, chunks or not."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from cola_runtime.adapter_spec import lora_spec
from cola_runtime.adapters.flat_layout import FlatLayout
from cola_runtime.device import optimizer
from cola_runtime.device.optimizer import build_optimizer
from cola_runtime.types import OptimizerHyperparameters, TensorKey
from tests.device.adapter_samples import SITES

STEPS = 5


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def hyperparameters(kind: str, *, weight_decay: float, momentum: float) -> OptimizerHyperparameters:
    nesterov = kind == "sgd" and momentum > 0
    return OptimizerHyperparameters(
        kind=kind, learning_rate=0.02, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov
    )


def torch_optimizer(hyper: OptimizerHyperparameters, parameters: list[Tensor]) -> torch.optim.Optimizer:
    if hyper.kind == "adamw":
        return torch.optim.AdamW(parameters, lr=0.02, weight_decay=hyper.weight_decay)
    momentum, nesterov = hyper.momentum, hyper.nesterov
    return torch.optim.SGD(
        parameters, lr=0.02, momentum=momentum, nesterov=nesterov, weight_decay=hyper.weight_decay
    )


@pytest.mark.parametrize("chunk", [7, 64, 32_768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kind", "decay", "momentum"),
    [("adamw", 0.0, 0.0), ("adamw", 0.1, 0.0), ("sgd", 0.1, 0.9), ("sgd", 0.0, 0.0)],
)
def test_a_vector_steps_as_its_tensors_do(
    kind: str, decay: float, momentum: float, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "CHUNK_NUMBERS", chunk)
    layout = FlatLayout(lora_spec(rank=3, alpha=6.0, use_rslora=False, seed=1, sites=SITES))
    hyper = hyperparameters(kind, weight_decay=decay, momentum=momentum)
    draw = torch.Generator().manual_seed(0)
    weights_P = torch.randn(layout.numel, generator=draw, dtype=dtype)
    alone = {key: view.clone() for key, view in layout.views(weights_P).items()}
    theirs, ours = torch_optimizer(hyper, list(alone.values())), build_optimizer(hyper, layout, weights_P)
    for step in range(STEPS):
        gradient_P = torch.randn(layout.numel, generator=draw, dtype=dtype) * 10.0 ** (step - 3)
        _hand_over(layout.views(gradient_P), alone)
        theirs.param_groups[0]["lr"] = rate = 0.02 / (step + 1)
        theirs.step()
        ours.step(weights_P, gradient_P, rate=rate, clip=None)
        for key, view in layout.views(weights_P).items():
            assert torch.equal(view, alone[key])
        for name, value in ours.states().items():
            of_each = [theirs.state[parameter][name].reshape(-1) for parameter in alone.values()]
            assert torch.equal(value, torch.cat(of_each))


def _hand_over(gradients: Mapping[TensorKey, Tensor], parameters: Mapping[TensorKey, Tensor]) -> None:
    for key, parameter in parameters.items():
        parameter.grad = gradients[key].clone()
