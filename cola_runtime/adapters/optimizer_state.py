"""What each optimizer remembers of one weight: torch.optim's own names and shapes. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from cola_runtime.adapters.shapes import Shape
from cola_runtime.types import OptimizerHyperparameters, TensorKey

STEP = "step"  # a float32 scalar whatever the weight's dtype: how often this optimizer has stepped


def state_shapes(optimizer: OptimizerHyperparameters, shape: Shape) -> dict[str, Shape]:
    """State name -> shape for a weight of `shape`, from the first step on; all but STEP in its dtype.

    Adafactor keeps the mean squares of a matrix' rows and columns (of its last two dimensions), and every
    square of a vector.
    """
    if optimizer.kind == "adamw":
        return {"exp_avg": shape, "exp_avg_sq": shape, STEP: ()}
    if optimizer.kind == "adafactor" and len(shape) > 1:
        return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1]), STEP: ()}
    if optimizer.kind == "adafactor":
        return {"variance": shape, STEP: ()}
    return {"momentum_buffer": shape} if optimizer.momentum else {}


def state_layout(
    optimizer: OptimizerHyperparameters, shapes: Mapping[TensorKey, Shape]
) -> dict[str, dict[TensorKey, Shape]]:
    """State name -> its shape for each weight that has one, in the weights' order."""
    layout: dict[str, dict[TensorKey, Shape]] = {}
    for key, shape in shapes.items():
        for name, of_state in state_shapes(optimizer, shape).items():
            layout.setdefault(name, {})[key] = of_state
    return layout


def state_bytes(optimizer: OptimizerHyperparameters, shape: Shape, *, itemsize: int) -> int:
    """Of a weight of `shape` whose dtype has `itemsize` bytes."""
    shapes = state_shapes(optimizer, shape)
    return sum((4 if name == STEP else itemsize) * prod(of_state) for name, of_state in shapes.items())


def training_bytes(
    optimizer: OptimizerHyperparameters, shapes: Iterable[Shape], *, itemsize: int, versions: int = 1
) -> int:
    """What a device holds of an adapter from its first step on: so many versions of its weights, the gradient
    sums and the optimizer's state.
    """
    return sum(
        (1 + versions) * itemsize * prod(shape) + state_bytes(optimizer, shape, itemsize=itemsize)
        for shape in shapes
    )
