"""Buffers that live from step to step.

Fresh memory is expensive: on a CPU the page faults of a large temporary cost up to as much as the matrix
product that fills it. Every buffer grows to the largest step seen and is then reused.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cola_runtime.base_model.accelerator import HOST
from cola_runtime.base_model.whole_tiles import TILE_ROWS


class Workspace:
    """Named buffers of one compute thread. Asking for a name again gives the same memory."""

    def __init__(self, device: torch.device = HOST.device) -> None:
        self._device = device
        self.generation = 0  # a new one whenever a buffer has got other memory
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype], Tensor] = {}  # what was handed out of each buffer last

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor with undefined content, valid until its name and dtype are asked for again.

        Behind it there is memory for the rest of a tile of its last dimension (`whole_tiles`).
        """
        key = name, dtype
        view = self._views.get(key)
        if view is not None and view.shape == shape:
            return view  # as in the layer before: slicing anew took 1 to 2 % of a short step
        numel = math.prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            self._buffers.pop(key, None)
            self._views.pop(key, None)
            del buffer, view  # freed before the larger one is allocated
            self.generation += 1
            buffer = self._buffers[key] = self._allocated(name, self._roomy(numel, shape), dtype)
        view = self._views[key] = buffer[:numel].view(shape)
        return view

    def _roomy(self, numel: int, shape: tuple[int, ...]) -> int:
        """On CUDA up to a quarter more, so that few steps move a buffer: captured passes end with that."""
        if self._device.type == "cuda":
            step = max(1, (1 << numel.bit_length()) // 8)
            return -(-numel // step) * step
        return numel + ((TILE_ROWS - 1) * shape[-1] if len(shape) == 2 else 0)

    def _allocated(self, _name: str, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=self._device)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def release(self) -> None:
        """Forget every buffer; tensors handed out keep their memory alive themselves."""
        self.generation += 1
        self._buffers.clear()
        self._views.clear()
