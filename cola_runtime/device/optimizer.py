"""torch's own optimizers over one adapter's tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from cola_runtime.errors import InvalidInput
from cola_runtime.types import OptimizerHyperparameters


def build_optimizer(parameters: Iterable[Tensor], hyper: OptimizerHyperparameters) -> Optimizer:
    """torch.optim.AdamW, SGD or Adafactor with `hyper`, bit for bit what torch does by default on a CPU.

    AdamW and SGD are element-wise: one list operation per term instead of one per tensor. Adafactor goes
    matrix by matrix: in list operations it is no faster and rounds otherwise. Clipping is not in here: it
    belongs to the step. Raises InvalidInput OPTIMIZER_UNKNOWN.
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
    if hyper.kind == "adafactor":
        return torch.optim.Adafactor(
            parameters,
            lr=hyper.learning_rate,
            beta2_decay=hyper.beta2_decay,
            eps=(hyper.eps1, hyper.eps2),
            d=hyper.d,
            weight_decay=hyper.weight_decay,
            foreach=False,
        )
    raise InvalidInput(
        "OPTIMIZER_UNKNOWN", f"optimizer {hyper.kind!r} is unknown", remedy="Use adamw, sgd or adafactor."
    )
