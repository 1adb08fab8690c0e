"""All tensors of one adapter as one vector [P]: site by site in catalogue order, one behind the other.

What is done to every number alike (clip, AdamW, SGD, a copy, a tensor on the wire) is one operation on the
vector instead of one per tensor, with the same bits: an element-wise operation gives an element the same
value wherever it stands. Views of it are made in one call, too: each of torch's lets go of the interpreter,
and where another thread computes, it may be long in coming back.
"""

from __future__ import annotations

from itertools import accumulate
from math import prod

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors as flatten_dense_tensors
from torch._utils import _unflatten_dense_tensors as unflatten_dense_tensors

from cola_runtime.adapter_spec import AdapterSpec
from cola_runtime.adapters.shapes import Shape, weight_shapes
from cola_runtime.types import TensorKey


class FlatLayout:
    """Where each weight, and each gradient, of an adapter lies in its vector [P]."""

    def __init__(self, spec: AdapterSpec) -> None:
        self.shapes: dict[TensorKey, Shape] = weight_shapes(spec)
        self.sizes = [prod(shape) for shape in self.shapes.values()]
        self.starts = [0, *accumulate(self.sizes)]  # of each tensor, then P
        self._examples = [torch.empty(shape, device="meta") for shape in self.shapes.values()]

    @property
    def numel(self) -> int:
        """P."""
        return self.starts[-1]

    def views(self, flat_P: Tensor) -> dict[TensorKey, Tensor]:
        """Every tensor in its shape, on the vector's own memory."""
        views = unflatten_dense_tensors(flat_P, self._examples)  # type: ignore[no-untyped-call]
        return dict(zip(self.shapes, views, strict=True))

    def flat(self, tensors: dict[TensorKey, Tensor]) -> Tensor:
        """A new vector with a copy of every tensor."""
        in_order = [tensors[key].detach() for key in self.shapes]
        flat_P: Tensor = flatten_dense_tensors(in_order)  # type: ignore[no-untyped-call]
        return flat_P if len(in_order) > 1 else flat_P.clone()  # of one it is a view
