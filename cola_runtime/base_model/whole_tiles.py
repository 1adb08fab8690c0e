"""Rows rounded up to whole tiles of the processor.

For every number of rows oneDNN compiles a bfloat16 product anew, which takes 1 to 30 ms, and it works in
tiles of 16 rows whatever their number is. So a product is asked for whole tiles: what lies behind the rows in
their buffer is computed too, in rows that nobody reads. An adapter's products have no room for that, since
their rows lie between others': there the cohorts' lengths are padded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cola_runtime.base_model.segments import as_it_is

TILE_ROWS = 16
NEAR_TOKENS = 4
"""To whose multiples cohorts are padded: a quarter of the lengths that products are compiled for, and 3 to
4 % more tokens of short rows (docs/performance.md)."""


def near_length(dtype: torch.dtype, device: torch.device) -> Callable[[int], int]:
    """How long segments are padded that are computed together, for the longest one's length."""
    return _near if _compiles(dtype, device) else as_it_is


def _near(longest: int) -> int:
    return -(-longest // NEAR_TOKENS) * NEAR_TOKENS


def _compiles(dtype: torch.dtype, device: torch.device) -> bool:
    """Products of every new shape are compiled first."""
    return dtype == torch.bfloat16 and device.type == "cpu"


def whole_rows(rows: int, like: Tensor) -> int:
    """How many rows a product in this dtype on this device should have instead of `rows`."""
    return _whole(rows) if _compiles(like.dtype, like.device) else rows


def whole_tiles(*tensors_NI: Tensor) -> tuple[Tensor, ...]:
    """Each with the rows behind it that make the tiles whole; as they are unless all have that memory.

    For products that are oneDNN's in any dtype.
    """
    rows = _whole(len(tensors_NI[0]))
    if rows == len(tensors_NI[0]) or not all(_has_room(tensor, rows) for tensor in tensors_NI):
        return tensors_NI
    return tuple(tensor.as_strided((rows, tensor.shape[1]), tensor.stride()) for tensor in tensors_NI)


def _whole(rows: int) -> int:
    return -(-rows // TILE_ROWS) * TILE_ROWS


def _has_room(tensor_NI: Tensor, rows: int) -> bool:
    stop = tensor_NI.storage_offset() + rows * tensor_NI.shape[1]
    return tensor_NI.is_contiguous() and stop * tensor_NI.itemsize <= tensor_NI.untyped_storage().nbytes()
