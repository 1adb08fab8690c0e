"""All tensors of one adapter as one vector [P]: site by site in catalogue order, one behind the other.

What is done to every number alike (clip, AdamW, SGD, a copy, a tensor on the wire) is one operation on the
vector instead of one per tensor, with the same bits: an element-wise operation gives an element the same
value wherever it stands.
"""

from __future__ import annotations

from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from cola_runtime.adapter_spec import AdapterSpec
from cola_runtime.adapters.shapes import Shape, weight_shapes
from cola_runtime.types import TensorKey


class FlatLayout:
    """Where each weight, and each gradient, of an adapter lies in its vector [P]."""

    def __init__(self, spec: AdapterSpec) -> None:
        self.shapes: dict[TensorKey, Shape] = weight_shapes(spec)
        self.sizes = [prod(shape) for shape in self.shapes.values()]
        self.starts = [0, *accumulate(self.sizes)]  # of each tensor, then P

    @property
    def numel(self) -> int:
        """P."""
        return self.starts[-1]

    def views(self, flat_P: Tensor) -> dict[TensorKey, Tensor]:
        """Every tensor in its shape, on the vector's own memory."""
        parts = torch.split(flat_P, self.sizes)
        return {key: part.view(shape) for (key, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def flat(self, tensors: dict[TensorKey, Tensor]) -> Tensor:
        """A new vector with a copy of every tensor."""
        return torch.cat([tensors[key].detach().reshape(-1) for key in self.shapes])
