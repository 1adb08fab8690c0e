"""torch.optim's AdamW, SGD and Adafactor over one adapter's vector, bit for bit what torch does on a CPU.

AdamW and SGD are element-wise: a few operations on the whole vector (`adapters/flat_layout.py`) instead of a
few per tensor. It is walked in chunks that stay in a core's own cache from the first operation to the last,
since memory is where a step's time goes. Adafactor goes matrix by matrix: torch's own, on views.

torch's fused AdamW would take a third of the time, but its last bits depend on where in a tensor a number
stands, and differ from torch's default in one of 30,000. Shapes: P numbers of one adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from cola_runtime.adapters.flat_layout import FlatLayout
from cola_runtime.adapters.optimizer_state import STEP, state_layout
from cola_runtime.errors import InvalidInput
from cola_runtime.types import OptimizerHyperparameters

CHUNK_NUMBERS = 32_768
"""Per thread: five float32 vectors of a chunk are 640 KiB. torch divides no operation on fewer numbers."""

MAX_COUNT = 2**24  # torch counts steps in float32, which 2^24 + 1 leaves at 2^24

States = dict[str, Tensor]
"""State name -> that of every weight which has one, one behind the other in catalogue order."""


class AdapterOptimizer(Protocol):
    """Owns the optimizer's state of one adapter, from its first step on."""

    def step(self, weights_P: Tensor, gradient_P: Tensor, *, rate: float, clip: Tensor | None) -> None:
        """One step, in place. `clip`, [] in the vectors' dtype, is what the gradient is multiplied by first,
        in place; None leaves it.
        """

    def states(self) -> States:
        """What torch.optim would remember, under its names, maybe on the optimizer's own memory; {} before
        the first step.
        """

    def load(self, states: Mapping[str, Tensor]) -> None:
        """Take over copies of `states`."""


def build_optimizer(
    hyper: OptimizerHyperparameters, layout: FlatLayout, weights_P: Tensor
) -> AdapterOptimizer:
    """Raises InvalidInput OPTIMIZER_UNKNOWN. Clipping's norm is not in here: it belongs to the step."""
    if hyper.kind == "adamw":
        return FlatAdamW(hyper, layout, weights_P.dtype)
    if hyper.kind == "sgd":
        return FlatSgd(hyper, layout, weights_P.dtype)
    if hyper.kind == "adafactor":
        return TorchAdafactor(hyper, layout, weights_P)
    raise InvalidInput(
        "OPTIMIZER_UNKNOWN", f"optimizer {hyper.kind!r} is unknown", remedy="Use adamw, sgd or adafactor."
    )


class FlatAdamW:
    """torch.optim.AdamW: m = lerp(m, g, 1 - b1); v = b2 v + (1 - b2) g^2; w = (1 - lr wd) w - lr^ m / d,
    d = sqrt(v) / sqrt(1 - b2^t) + eps, lr^ = lr / (1 - b1^t).
    """

    def __init__(self, hyper: OptimizerHyperparameters, layout: FlatLayout, dtype: torch.dtype) -> None:
        self._hyper, self._weights = hyper, len(layout.shapes)
        self._count = 0
        self._exp_avg_P = torch.zeros(layout.numel, dtype=dtype)
        self._exp_avg_sq_P = torch.zeros(layout.numel, dtype=dtype)

    def step(self, weights_P: Tensor, gradient_P: Tensor, *, rate: float, clip: Tensor | None) -> None:
        hyper, (beta1, beta2) = self._hyper, self._hyper.betas
        self._count = min(self._count + 1, MAX_COUNT)
        correction1 = 1 - beta1**self._count
        root_of_correction2 = (1 - beta2**self._count) ** 0.5
        scratch = torch.empty(_chunk_numbers(), dtype=weights_P.dtype)
        chunks = _chunks(weights_P, gradient_P, self._exp_avg_P, self._exp_avg_sq_P)
        for weights, gradient, exp_avg, exp_avg_sq in chunks:
            if clip is not None:
                gradient.mul_(clip)
            if hyper.weight_decay:
                weights.mul_(1 - rate * hyper.weight_decay)
            exp_avg.lerp_(gradient, 1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            divisor = torch.sqrt(exp_avg_sq, out=scratch[: len(weights)])
            divisor.div_(root_of_correction2).add_(hyper.eps)
            weights.addcdiv_(exp_avg, divisor, value=-(rate / correction1))

    def states(self) -> States:
        if not self._count:
            return {}
        counts = torch.full((self._weights,), float(self._count))
        return {STEP: counts, "exp_avg": self._exp_avg_P, "exp_avg_sq": self._exp_avg_sq_P}

    def load(self, states: Mapping[str, Tensor]) -> None:
        self._count = int(states[STEP][0]) if states else 0
        _fill(self._exp_avg_P, states.get("exp_avg"))
        _fill(self._exp_avg_sq_P, states.get("exp_avg_sq"))


class FlatSgd:
    """torch.optim.SGD: g += wd w; b = mu b + g (at first b = g); w -= lr b; Nesterov: w -= lr (g + mu b)."""

    def __init__(self, hyper: OptimizerHyperparameters, layout: FlatLayout, dtype: torch.dtype) -> None:
        self._hyper = hyper
        self._stepped = False
        self._momentum_P = torch.zeros(layout.numel if hyper.momentum else 0, dtype=dtype)

    def step(self, weights_P: Tensor, gradient_P: Tensor, *, rate: float, clip: Tensor | None) -> None:
        hyper = self._hyper
        momentum_P = self._momentum_P if hyper.momentum else gradient_P
        for weights, gradient, momentum in _chunks(weights_P, gradient_P, momentum_P):
            if clip is not None:
                gradient.mul_(clip)
            if hyper.weight_decay:
                gradient.add_(weights, alpha=hyper.weight_decay)
            if hyper.momentum:
                self._remember(momentum, gradient)
            direction = gradient.add_(momentum, alpha=hyper.momentum) if hyper.nesterov else momentum
            weights.add_(direction, alpha=-rate)
        self._stepped = True

    def _remember(self, momentum: Tensor, gradient: Tensor) -> None:
        if self._stepped:
            momentum.mul_(self._hyper.momentum).add_(gradient)
        else:
            momentum.copy_(gradient)

    def states(self) -> States:
        return {"momentum_buffer": self._momentum_P} if self._stepped and self._hyper.momentum else {}

    def load(self, states: Mapping[str, Tensor]) -> None:
        self._stepped = bool(states)
        _fill(self._momentum_P, states.get("momentum_buffer"))


class TorchAdafactor:
    """torch.optim.Adafactor itself: in list operations it is no faster and rounds otherwise."""

    def __init__(self, hyper: OptimizerHyperparameters, layout: FlatLayout, weights_P: Tensor) -> None:
        self._layout = layout
        self._states = state_layout(hyper, layout.shapes)
        self._parameters = layout.views(weights_P)
        self._optimizer = torch.optim.Adafactor(
            list(self._parameters.values()),
            lr=hyper.learning_rate,
            beta2_decay=hyper.beta2_decay,
            eps=(hyper.eps1, hyper.eps2),
            d=hyper.d,
            weight_decay=hyper.weight_decay,
            foreach=False,
        )

    def step(self, weights_P: Tensor, gradient_P: Tensor, *, rate: float, clip: Tensor | None) -> None:
        """`weights_P` must be the vector that this was built with."""
        if clip is not None:
            gradient_P.mul_(clip)
        gradients = self._layout.views(gradient_P)
        for key, parameter in self._parameters.items():
            parameter.grad = gradients[key]
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()  # type: ignore[no-untyped-call]

    def states(self) -> States:
        if not self._optimizer.state:
            return {}
        return {
            name: torch.cat(
                [self._optimizer.state[self._parameters[key]][name].reshape(-1) for key in shapes]
            )
            for name, shapes in self._states.items()
        }

    def load(self, states: Mapping[str, Tensor]) -> None:
        self._optimizer.state.clear()
        for name, vector in states.items():
            shapes = self._states[name]
            for (key, shape), part in zip(
                shapes.items(), torch.split(vector, list(map(prod, shapes.values()))), strict=True
            ):
                self._optimizer.state[self._parameters[key]][name] = part.clone().view(shape)


def _chunks(*vectors_P: Tensor) -> Iterator[tuple[Tensor, ...]]:
    numbers = _chunk_numbers()
    return zip(*(torch.split(vector, numbers) for vector in vectors_P), strict=True)


def _chunk_numbers() -> int:
    return CHUNK_NUMBERS * torch.get_num_threads()


def _fill(vector_P: Tensor, state_P: Tensor | None) -> None:
    if state_P is None:
        vector_P.zero_()
    else:
        vector_P.copy_(state_P)
