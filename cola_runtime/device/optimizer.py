"""torch.optim's AdamW, SGD and Adafactor over one adapter's vector, bit for bit what torch does on a CPU.

AdamW and SGD are element-wise: a few operations on the whole vector (`adapters/flat_layout.py`) instead of a
few per tensor. It is walked in chunks that stay in a core's own cache from the first operation to the last,
since memory is where a step's time goes. Adafactor goes matrix by matrix: torch's own, on views.

torch's fused AdamW would take a third of the time, but its last bits depend on where in a tensor a number
stands, and differ from torch's default in one of 30,000. Shapes: P numbers of one adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from cola_runtime.adapters.flat_layout import FlatLayout
from cola_runtime.adapters.optimizer_state import STEP
from cola_runtime.errors import InvalidInput
from cola_runtime.types import OptimizerHyperparameters, TensorKey

CHUNK_NUMBERS = 32_768
"""Per thread: five float32 vectors of a chunk are 640 KiB. torch divides no operation on fewer numbers."""

MAX_COUNT = 2**24  # torch counts steps in float32, which 2^24 + 1 leaves at 2^24

State = dict[str, Tensor]


class AdapterOptimizer(Protocol):
    """Owns the optimizer's state of one adapter, from its first step on."""

    def step(self, weights_P: Tensor, gradient_P: Tensor, *, rate: float, clip: Tensor | None) -> None:
        """One step, in place. `clip`, [] in the vectors' dtype, is what the gradient is multiplied by first,
        in place; None leaves it.
        """

    def states(self) -> dict[TensorKey, State]:
        """What torch.optim would remember of each weight, under its names, on the optimizer's own memory; {}
        of each before the first step.
        """

    def load(self, states: Mapping[TensorKey, Mapping[str, Tensor]]) -> None:
        """Take over copies of `states`, which are those of every weight (maybe {})."""


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
        self._hyper, self._layout = hyper, layout
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

    def states(self) -> dict[TensorKey, State]:
        if not self._count:
            return {key: {} for key in self._layout.shapes}
        step = torch.tensor(float(self._count))
        squares = self._layout.views(self._exp_avg_sq_P)
        return {
            key: {STEP: step, "exp_avg": mean, "exp_avg_sq": squares[key]}
            for key, mean in self._layout.views(self._exp_avg_P).items()
        }

    def load(self, states: Mapping[TensorKey, Mapping[str, Tensor]]) -> None:
        counts = [int(state[STEP]) for state in states.values() if state]
        self._count = counts[0] if counts else 0
        _fill(self._layout, self._exp_avg_P, states, "exp_avg")
        _fill(self._layout, self._exp_avg_sq_P, states, "exp_avg_sq")


class FlatSgd:
    """torch.optim.SGD: g += wd w; b = mu b + g (at first b = g); w -= lr b; Nesterov: w -= lr (g + mu b)."""

    def __init__(self, hyper: OptimizerHyperparameters, layout: FlatLayout, dtype: torch.dtype) -> None:
        self._hyper, self._layout = hyper, layout
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

    def states(self) -> dict[TensorKey, State]:
        if not self._stepped or not self._hyper.momentum:
            return {key: {} for key in self._layout.shapes}
        views = self._layout.views(self._momentum_P)
        return {key: {"momentum_buffer": momentum} for key, momentum in views.items()}

    def load(self, states: Mapping[TensorKey, Mapping[str, Tensor]]) -> None:
        self._stepped = any(states.values())
        if self._hyper.momentum:
            _fill(self._layout, self._momentum_P, states, "momentum_buffer")


class TorchAdafactor:
    """torch.optim.Adafactor itself: in list operations it is no faster and rounds otherwise."""

    def __init__(self, hyper: OptimizerHyperparameters, layout: FlatLayout, weights_P: Tensor) -> None:
        self._layout = layout
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

    def states(self) -> dict[TensorKey, State]:
        return {
            key: {name: value for name, value in self._of(parameter).items() if isinstance(value, Tensor)}
            for key, parameter in self._parameters.items()
        }

    def load(self, states: Mapping[TensorKey, Mapping[str, Tensor]]) -> None:
        self._optimizer.state.clear()
        for key, state in states.items():
            if state:
                copies = {name: value.clone() for name, value in state.items()}
                self._optimizer.state[self._parameters[key]] = copies

    def _of(self, parameter: Tensor) -> State:
        state: State = self._optimizer.state.get(parameter, {})
        return state


def _chunks(*vectors_P: Tensor) -> Iterator[tuple[Tensor, ...]]:
    numbers = _chunk_numbers()
    return zip(*(torch.split(vector, numbers) for vector in vectors_P), strict=True)


def _chunk_numbers() -> int:
    return CHUNK_NUMBERS * torch.get_num_threads()


def _fill(
    layout: FlatLayout, vector_P: Tensor, states: Mapping[TensorKey, Mapping[str, Tensor]], name: str
) -> None:
    """Copy one state of every weight into the vector; zeros where there is none yet."""
    for key, view in layout.views(vector_P).items():
        state = states[key]
        if state:
            view.copy_(state[name])
        else:
            view.zero_()
