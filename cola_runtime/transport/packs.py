"""The pack: many small tensors of one microbatch in one frame, which costs hardly more than one of them.

The frame's header (frames.py) has kind 3, the elements' dtype, no shape, site and tensor id of the first
tensor, the number of tensors as its slot, and total = payload. Its payload is an index, one entry a tensor,
and then their elements in that order without gaps:

    offset size  of an entry
         0    2  site       2  2 tensor id (TensorKind)    4  2 slot    6  2 number of dimensions (0 to 4)
         8   16  shape, four u32, unused ones 0

A step's packs have the same indexes as the step's before: a reader keeps those that it has checked.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from cola_runtime.errors import ProtocolError
from cola_runtime.gradients.packed import PackedKeys
from cola_runtime.transport.frames import (
    DTYPES,
    MAX_DIMENSIONS,
    TENSOR_KINDS,
    DType,
    Frame,
    FrameKind,
    Header,
    TensorAddress,
    element_bytes,
    frame_header,
)
from cola_runtime.types import TensorKey

ENTRY_BYTES = 24
MAX_PACKED_TENSORS = 4096

_ENTRY_FORMAT = "<HHHH4I"
_KEPT_INDEXES = 256  # of at most MAX_PACKED_TENSORS entries each
_KEPT_INDEX_BYTES = 16_384  # a longer one is checked each time


class PackedTensors(NamedTuple):
    """Tensors of one dtype as they travel: their elements (or int8 blocks) in the index' order."""

    dtype: DType
    entries: bytes  # the index
    data: Sequence[memoryview]  # format "B", one dimension: of each tensor, or of all of them


class PackIndex(NamedTuple):
    packed: PackedKeys
    sizes: tuple[int, ...]  # bytes of each tensor
    data_bytes: int


class ReceivedPack(NamedTuple):
    """A checked pack. `data` is part of the message, and not writable; `contents` is the same object for
    equal packs.
    """

    address: TensorAddress  # of the first tensor
    dtype: DType
    contents: PackIndex
    data: memoryview
    wire_bytes: int


@lru_cache(maxsize=1024)  # a step's packs hold what the step's before held
def pack_index(keys: tuple[TensorKey, ...], shapes: tuple[tuple[int, ...], ...]) -> bytes:
    """The index of tensors in this order."""
    entries = bytearray()
    for key, shape in zip(keys, shapes, strict=True):
        unused = (0,) * (MAX_DIMENSIONS - len(shape))
        entries += struct.pack(_ENTRY_FORMAT, key.site, key.kind, key.slot, len(shape), *shape, *unused)
    return bytes(entries)


def pack_frame(address: TensorAddress, tensors: PackedTensors) -> Frame:
    """One frame; `address` is the first tensor's, `tensors.data` must not change until it was sent."""
    of_pack = address._replace(slot=len(tensors.entries) // ENTRY_BYTES)
    header = frame_header(FrameKind.PACK, of_pack, tensors.dtype, tensors.entries, *tensors.data)
    return header, tensors.entries, *tensors.data


class PackIndexes:
    """The indexes that one stream has brought, checked once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, bytes], PackIndex] = {}

    def of(self, header: Header, payload: memoryview) -> PackIndex:
        """Raises ProtocolError PACK_INVALID unless header, index and payload agree with one another."""
        index_bytes = header.slot * ENTRY_BYTES
        if not 0 < header.slot <= MAX_PACKED_TENSORS or header.offset or header.shape:
            raise _invalid(f"{header.slot} tensors, offset {header.offset}, shape {header.shape}")
        if header.total_bytes != header.payload_bytes or index_bytes > header.payload_bytes:
            raise _invalid(f"an index of {index_bytes} bytes in {header.payload_bytes}")
        key = header.dtype, bytes(payload[:index_bytes])
        index = self._known.get(key)
        if index is None:
            index = _checked_index(*key)
            if index_bytes <= _KEPT_INDEX_BYTES and len(self._known) < _KEPT_INDEXES:
                self._known[key] = index
        if index.data_bytes != header.payload_bytes - index_bytes:
            raise _invalid(f"tensors of {index.data_bytes} bytes in {header.payload_bytes - index_bytes}")
        first = index.packed.keys[0]
        if (first.site, first.kind) != (header.site, header.tensor):
            raise _invalid(
                f"its header names tensor {header.tensor} of site {header.site}, its index {first}"
            )
        return index


def _checked_index(dtype: int, entries: bytes) -> PackIndex:
    keys, shapes, sizes = [], [], []
    for site, tensor, slot, dimensions, *shape in struct.iter_unpack(_ENTRY_FORMAT, entries):
        kind = TENSOR_KINDS.get(tensor)
        if kind is None or dtype not in DTYPES or dimensions > MAX_DIMENSIONS or any(shape[dimensions:]):
            raise _invalid(f"tensor id {tensor}, dtype {dtype}, {dimensions} dimensions of {shape}")
        keys.append(TensorKey(site, kind, slot))
        shapes.append(tuple(shape[:dimensions]))
        sizes.append(element_bytes(dtype, shapes[-1]))
    return PackIndex(PackedKeys(tuple(keys), tuple(shapes)), tuple(sizes), sum(sizes))


def _invalid(problem: str) -> ProtocolError:
    return ProtocolError("PACK_INVALID", f"a pack contradicts itself: {problem}")
