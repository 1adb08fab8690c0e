"""How fast this machine multiplies matrices, for the encodings' cost model."""

from __future__ import annotations

import math
import time

import torch

SIDE = 384
TRIALS = 5


def matrix_product_flops(dtype: torch.dtype) -> float:
    """FLOP/s of a square product in `dtype`, best of a few (0.1 s at most on a slow core), to a power of two.

    Rounded so coarsely that the same machine finds the same number again, also beside other work: jobs are
    planned with it.
    """
    left = torch.full((SIDE, SIDE), 0.5, dtype=dtype)
    seconds = min(_timed_product(left) for _ in range(TRIALS))
    return 2.0 ** round(math.log2(2.0 * SIDE**3 / seconds))


def _timed_product(matrix: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.mm(matrix, matrix)
    return time.perf_counter() - started
