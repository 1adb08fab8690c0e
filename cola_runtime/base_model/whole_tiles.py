"""Rows rounded up to whole tiles of the processor.

For every number of rows oneDNN compiles a bfloat16 product anew, which takes 1 to 30 ms, and it works in
tiles of 16 rows whatever their number is. So a product is asked for whole tiles: what lies behind the rows in
their buffer is computed too, in rows that nobody reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_ROWS = 16


def whole_rows(rows: int, like: Tensor) -> int:
    """How many rows a product in this dtype on this device should have instead of `rows`."""
    in_tiles = like.dtype == torch.bfloat16 and like.device.type == "cpu"
    return -(-rows // TILE_ROWS) * TILE_ROWS if in_tiles else rows


def whole_tiles(*tensors_NI: Tensor) -> tuple[Tensor, ...]:
    """Each with the rows behind it that make the tiles whole; as they are unless all have that memory."""
    rows = whole_rows(len(tensors_NI[0]), tensors_NI[0])
    if rows == len(tensors_NI[0]) or not all(_has_room(tensor, rows) for tensor in tensors_NI):
        return tensors_NI
    return tuple(tensor.as_strided((rows, tensor.shape[1]), tensor.stride()) for tensor in tensors_NI)


def _has_room(tensor_NI: Tensor, rows: int) -> bool:
    stop = tensor_NI.storage_offset() + rows * tensor_NI.shape[1]
    return tensor_NI.is_contiguous() and stop * tensor_NI.itemsize <= tensor_NI.untyped_storage().nbytes()
