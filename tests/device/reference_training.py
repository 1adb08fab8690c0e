"""torch.optim alone, as the yardstick: plain parameters, torch's own clip, the stated schedule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.adapters.checkpoint_format import TrainingDefinition
from cola_runtime.adapters.schedule import learning_rate
from cola_runtime.types import TensorKey


def train_alone(
    training: TrainingDefinition, steps: Sequence[Sequence[dict[TensorKey, Tensor]]]
) -> dict[TensorKey, Tensor]:
    """The weights after `steps`, each a list of microbatch gradients that add up."""
    weights = {key: tensor.requires_grad_() for key, tensor in initial_weights(training.spec).items()}
    optimizer = _optimizer(list(weights.values()), training)
    for step, microbatches in enumerate(steps):
        for key, parameter in weights.items():
            parts = [grads[key.gradient] for grads in microbatches]
            parameter.grad = sum(parts[1:], parts[0].clone())
        if training.optimizer.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(weights.values()), training.optimizer.max_grad_norm)
        rate = learning_rate(training.schedule, training.optimizer.learning_rate, step)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return {key: tensor.detach() for key, tensor in weights.items()}


def _optimizer(parameters: list[Tensor], training: TrainingDefinition) -> torch.optim.Optimizer:
    hyper = training.optimizer
    if hyper.kind == "adamw":
        return torch.optim.AdamW(
            parameters, lr=1.0, betas=hyper.betas, eps=hyper.eps, weight_decay=hyper.weight_decay
        )
    if hyper.kind == "adafactor":
        return torch.optim.Adafactor(
            parameters,
            lr=1.0,
            beta2_decay=hyper.beta2_decay,
            eps=(hyper.eps1, hyper.eps2),
            d=hyper.d,
            weight_decay=hyper.weight_decay,
        )
    assert hyper.kind == "sgd"
    return torch.optim.SGD(
        parameters,
        lr=1.0,
        momentum=hyper.momentum,
        weight_decay=hyper.weight_decay,
        nesterov=hyper.nesterov,
    )
