"""The point (A0, B0) that a linearized LoRA is the tangent at. Torch-free: an export needs it too.

Of (base_seed, site name) alone, so that adapters of one base_seed add exactly. Shapes: I in_features,
O out_features, R rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cola_runtime.adapter_spec import LinearizedLoraKind
from cola_runtime.adapters.numpy_draws import uniform
from cola_runtime.types import Site


def base_a(kind: LinearizedLoraKind, site: Site) -> NDArray[np.float64]:
    """A0 [R, I]: U(-1/sqrt(I), 1/sqrt(I))."""
    shape = (kind.rank, site.in_features)
    return uniform(f"{kind.base_seed}/{site.name}", shape, bound=shape[1] ** -0.5)


def base_b(kind: LinearizedLoraKind, site: Site) -> NDArray[np.float64]:
    """B0 [O, R]: zero, or U(-1/sqrt(R), 1/sqrt(R))."""
    shape = (site.out_features, kind.rank)
    if kind.initial_b == "zero":
        return np.zeros(shape)
    return uniform(f"{kind.base_seed}/{site.name}/b", shape, bound=shape[1] ** -0.5)
