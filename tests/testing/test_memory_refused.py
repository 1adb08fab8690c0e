"""What the kernel refuses is known for what it is, whoever asked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from cola_runtime.machine import is_memory_refused
from tests.limits import no_more_memory

NUMBERS = 1 << 28  # a GiB of float32


@pytest.mark.parametrize("ask", [torch.empty, lambda n: np.empty(n, np.float32), lambda n: bytearray(4 * n)])
def test_a_buffer_that_the_kernel_refuses_is_named(ask: Callable[[int], object]) -> None:
    with no_more_memory(but_bytes=8 << 20), pytest.raises((MemoryError, RuntimeError)) as caught:
        ask(NUMBERS)
    assert is_memory_refused(caught.value)


def test_other_errors_are_none() -> None:
    assert not is_memory_refused(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_memory_refused(ValueError())
    assert is_memory_refused(torch.OutOfMemoryError("CUDA out of memory"))
