"""Random numbers that depend on a key alone, the same under every version of torch."""

from __future__ import annotations

import torch
from torch import Tensor

from cola_runtime.adapters import numpy_draws


def uniform(key: str, shape: tuple[int, ...], *, bound: float) -> Tensor:
    """`numpy_draws.uniform` as a float64 tensor."""
    return torch.from_numpy(numpy_draws.uniform(key, shape, bound=bound))


def normal(key: str, shape: tuple[int, ...], *, deviation: float) -> Tensor:
    """`numpy_draws.normal` as a float64 tensor."""
    return torch.from_numpy(numpy_draws.normal(key, shape, deviation=deviation))


def torch_seed(key: str) -> int:
    """A seed for torch.manual_seed, for what only torch can draw."""
    return numpy_draws.key_bits(key) % 2**63
