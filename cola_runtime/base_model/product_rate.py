"""How fast this machine multiplies matrices, for the encodings' cost model."""

from __future__ import annotations

import math
import time

import torch

from cola_runtime.base_model.accelerator import HOST, Accelerator

SIDE = 384
CUDA_SIDE = 4096
TRIALS = 5


def matrix_product_flops(dtype: torch.dtype, accelerator: Accelerator = HOST) -> float:
    """FLOP/s of a square product in `dtype`, best of a few (0.1 s at most on a slow core), to a power of two.

    Rounded so coarsely that the same machine finds the same number again, also beside other work: jobs are
    planned with it.
    """
    side = CUDA_SIDE if accelerator.is_cuda else SIDE
    left = torch.full((side, side), 0.5, dtype=dtype, device=accelerator.device)
    seconds = min(_timed_product(left, accelerator) for _ in range(TRIALS))
    return 2.0 ** round(math.log2(2.0 * side**3 / seconds))


def _timed_product(matrix: torch.Tensor, accelerator: Accelerator) -> float:
    accelerator.wait()
    started = time.perf_counter()
    torch.mm(matrix, matrix)
    accelerator.wait()
    return time.perf_counter() - started
