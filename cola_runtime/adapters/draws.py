"""Random numbers that depend on a key alone, the same under every version of torch."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def uniform(key: str, shape: tuple[int, ...], *, bound: float) -> Tensor:
    """U(-bound, bound) in float64: rounded later, so that float32 and float64 adapters of one seed agree.

    numpy's PCG64 takes the whole 128 bit key; torch's CPU generator would keep 32 bits of it.
    """
    generator = np.random.Generator(np.random.PCG64(_hash(key)))
    return torch.from_numpy((2.0 * generator.random(shape) - 1.0) * bound)


def normal(key: str, shape: tuple[int, ...], *, deviation: float) -> Tensor:
    """N(0, deviation^2) in float64; as `uniform` in all else."""
    generator = np.random.Generator(np.random.PCG64(_hash(key)))
    return torch.from_numpy(generator.standard_normal(shape) * deviation)


def torch_seed(key: str) -> int:
    """A seed for torch.manual_seed, for what only torch can draw."""
    return _hash(key) % 2**63


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
