"""Buffers that live from step to step."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cola_runtime.base_model.workspace import Workspace


def test_the_same_shape_again_is_the_same_memory_and_another_shape_has_its_own_view_of_it() -> None:
    space = Workspace()
    first = space.tensor("x", (4, 6), torch.float32).fill_(1.0)
    assert space.tensor("x", (4, 6), torch.float32).data_ptr() == first.data_ptr()
    smaller = space.tensor("x", (2, 3), torch.float32)
    assert smaller.shape == (2, 3) and smaller.data_ptr() == first.data_ptr()
    again = space.tensor("x", (4, 6), torch.float32)
    assert again.shape == (4, 6) and torch.equal(again, first)
    assert space.tensor("x", (4, 6), torch.bfloat16).data_ptr() != first.data_ptr()


def test_a_buffer_that_has_grown_is_what_later_steps_get() -> None:
    space = Workspace()
    small = space.tensor("x", (4, 6), torch.float32)
    generation = space.generation
    large = space.tensor("x", (400, 6), torch.float32)
    assert space.generation > generation
    assert large.shape == (400, 6)
    after = space.tensor("x", (4, 6), torch.float32)
    assert after.data_ptr() == large.data_ptr() != small.data_ptr()


def test_what_was_released_is_not_handed_out_again() -> None:
    space = Workspace()
    held = space.tensor("x", (4, 6), torch.float32)
    space.release()
    assert space.nbytes == 0
    assert space.tensor("x", (4, 6), torch.float32).data_ptr() != held.data_ptr()


def test_the_old_memory_is_free_before_a_buffer_grows() -> None:
    class Watched(Workspace):
        """Says at each allocation whose memory is still there."""

        def __init__(self) -> None:
            super().__init__()
            self.arrays: list[weakref.ref[Any]] = []
            self.there: list[int] = []

        def _allocated(self, _name: str, numel: int, dtype: torch.dtype) -> Tensor:
            self.there.append(sum(array() is not None for array in self.arrays))
            array = np.zeros(numel, np.float32)
            self.arrays.append(weakref.ref(array))
            return torch.from_numpy(array)

    space = Watched()
    for rows in (4, 400):
        space.tensor("x", (rows, 6), torch.float32)
    assert space.there == [0, 0]
