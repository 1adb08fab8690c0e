"""torch's own optimizers over one adapter's tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from cola_runtime.errors import InvalidInput
from cola_runtime.types import OptimizerHyperparameters


def build_optimizer(parameters: Iterable[Tensor], hyper: OptimizerHyperparameters) -> Optimizer:
    """torch.optim.AdamW or SGD with `hyper`, one fused list operation per term instead of one per tensor.

    Clipping is not in here: it belongs to the step. Raises InvalidInput OPTIMIZER_UNKNOWN.
    """
    if hyper.kind == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=hyper.learning_rate,
            betas=hyper.betas,
            eps=hyper.eps,
            weight_decay=hyper.weight_decay,
            foreach=True,
        )
    if hyper.kind == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=hyper.learning_rate,
            momentum=hyper.momentum,
            weight_decay=hyper.weight_decay,
            nesterov=hyper.nesterov,
            foreach=True,
        )
    raise InvalidInput(
        "OPTIMIZER_UNKNOWN", f"optimizer {hyper.kind!r} is unknown", remedy="Use adamw or sgd."
    )
