"""Random numbers that depend on a key alone. Torch-free; `draws` hands them out as tensors."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def uniform(key: str, shape: tuple[int, ...], *, bound: float) -> NDArray[np.float64]:
    """U(-bound, bound): rounded later, so that float32 and float64 adapters of one seed agree.

    numpy's PCG64 takes the whole 128 bit key; torch's CPU generator would keep 32 bits of it.
    """
    generator = np.random.Generator(np.random.PCG64(key_bits(key)))
    return (2.0 * generator.random(shape) - 1.0) * bound


def normal(key: str, shape: tuple[int, ...], *, deviation: float) -> NDArray[np.float64]:
    """N(0, deviation^2); as `uniform` in all else."""
    generator = np.random.Generator(np.random.PCG64(key_bits(key)))
    return generator.standard_normal(shape) * deviation


def uniform_bits(key: str, count: int) -> NDArray[np.uint32]:
    """`count` uniform 32 bit numbers; the first ones do not depend on how many are asked for."""
    words = np.random.PCG64(key_bits(key)).random_raw((count + 1) // 2)
    return words.astype("<u8", copy=False).view("<u4")[:count]


def key_bits(key: str) -> int:
    """128 bits of the key's SHA-256."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
