"""Random numbers that depend on a key alone, the same under every version of torch."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def uniform(key: str, shape: tuple[int, ...], *, bound: float) -> Tensor:
    """U(-bound, bound) in float64: rounded later, so that float32 and float64 adapters of one seed agree.

    numpy's PCG64 takes the whole 128 bit key; torch's CPU generator would keep 32 bits of it.
    """
    generator = np.random.Generator(np.random.PCG64(_hash(key)))
    return torch.from_numpy((2.0 * generator.random(shape) - 1.0) * bound)


def uniform_bits(key: str, count: int) -> NDArray[np.uint32]:
    """`count` uniform 32 bit numbers; the first ones do not depend on how many are asked for."""
    words = np.random.PCG64(_hash(key)).random_raw((count + 1) // 2)
    return words.astype("<u8", copy=False).view("<u4")[:count]


def torch_seed(key: str) -> int:
    """A seed for torch.manual_seed, for what only torch can draw."""
    return _hash(key) % 2**63


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
