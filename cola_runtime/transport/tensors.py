"""torch tensors to and from their bytes on the wire, without a copy where the memory allows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor
from torch._utils import _flatten_dense_tensors as flatten_dense_tensors

from cola_runtime.errors import ProtocolError
from cola_runtime.gradients.compression import Compressed, Int8Blocks, dequantized
from cola_runtime.transport.frames import (
    HEADER_BYTES,
    MAX_DIMENSIONS,
    MAX_PAYLOAD_BYTES,
    DType,
    Frame,
    TensorAddress,
    WireTensor,
    tensor_frames,
    tensor_wire_bytes,
)
from cola_runtime.transport.packs import (
    ENTRY_BYTES,
    MAX_PACKED_TENSORS,
    PackedTensors,
    ReceivedPack,
    pack_frame,
    pack_index,
)
from cola_runtime.transport.reader import ReceivedTensor
from cola_runtime.types import TensorKey

_TORCH_DTYPES = {
    DType.FLOAT32: torch.float32,
    DType.FLOAT64: torch.float64,
    DType.BFLOAT16: torch.bfloat16,
    DType.FLOAT16: torch.float16,
    DType.UINT8: torch.uint8,
    DType.INT32: torch.int32,
    DType.INT64: torch.int64,
}
VIEWED_BYTES = 64 << 10
"""A view costs some 10 us of Python; below this, copying a pack's tensors together costs less."""

_NUMPY_DTYPES = {  # numpy has no bfloat16: as numbers of the same size
    DType.FLOAT32: np.float32,
    DType.FLOAT64: np.float64,
    DType.BFLOAT16: np.int16,
    DType.FLOAT16: np.float16,
    DType.UINT8: np.uint8,
    DType.INT32: np.int32,
    DType.INT64: np.int64,
    DType.INT8_BLOCKS: np.uint8,
}
_WIRE_DTYPES = {dtype: code for code, dtype in _TORCH_DTYPES.items()}
_catalogue_order = attrgetter("site", "kind", "slot")


def to_wire(tensor: Compressed) -> WireTensor:
    """The tensor's elements in row-major order; a view when it is a contiguous CPU tensor, else a copy.

    The tensor must not change before it was sent. Raises ProtocolError TENSOR_INVALID for a type or a number
    of dimensions that the wire does not know.
    """
    dtype, elements = _elements(tensor)
    return WireTensor(dtype=dtype, shape=tuple(tensor.shape), data=_bytes_of(elements))


def _elements(tensor: Compressed) -> tuple[DType, Tensor]:
    """The dtype's code, and what travels of the tensor."""
    if isinstance(tensor, Int8Blocks):
        return DType.INT8_BLOCKS, tensor.payload
    dtype = _WIRE_DTYPES.get(tensor.dtype)
    if dtype is None or tensor.ndim > MAX_DIMENSIONS:
        raise ProtocolError("TENSOR_INVALID", f"cannot send {tensor.ndim} dimensions of {tensor.dtype}")
    return dtype, tensor


class Parcel:
    """Tensors of one dtype that leave in one frame, or one tensor alone. Copied only by `frames`."""

    __slots__ = ("_dtype", "_elements", "_keys", "_shapes", "data_bytes")

    def __init__(self, dtype: DType) -> None:
        self.data_bytes = 0
        self._dtype = dtype
        self._keys: list[TensorKey] = []
        self._shapes: list[tuple[int, ...]] = []
        self._elements: list[Tensor] = []

    def takes(self, dtype: DType, data_bytes: int) -> bool:
        """One more tensor like this fits into the same frame."""
        count = len(self._keys) + 1
        room = MAX_PAYLOAD_BYTES - self.data_bytes - count * ENTRY_BYTES
        return data_bytes <= room and dtype is self._dtype and count <= MAX_PACKED_TENSORS

    def add(self, key: TensorKey, shape: tuple[int, ...], elements: Tensor) -> None:
        self._keys.append(key)
        self._shapes.append(shape)
        self._elements.append(elements)
        self.data_bytes += elements.nbytes

    @property
    def dtype(self) -> DType:
        """Of all of them."""
        return self._dtype

    def __iter__(self) -> Iterator[tuple[TensorKey, tuple[int, ...], Tensor]]:
        """Keys, shapes and what travels of each, in order: what `add` was told."""
        return zip(self._keys, self._shapes, self._elements, strict=True)

    @property
    def wire_bytes(self) -> int:
        """On the stream, headers included."""
        count = len(self._keys)
        if count == 1:
            return tensor_wire_bytes(self.data_bytes)
        return HEADER_BYTES + count * ENTRY_BYTES + self.data_bytes

    def frames(self, address: TensorAddress) -> list[Frame]:
        """`address` says all but which tensor it is."""
        first = self._keys[0]
        address = address._replace(site=first.site, kind=first.kind, slot=first.slot)
        if len(self._keys) == 1:
            data = _bytes_of(self._elements[0])
            return list(tensor_frames(address, WireTensor(self._dtype, self._shapes[0], data)))
        entries = pack_index(tuple(self._keys), tuple(self._shapes))
        return [pack_frame(address, PackedTensors(self._dtype, entries, _bytes_of_all(self._elements)))]


def parcels(tensors: Mapping[TensorKey, Compressed]) -> list[Parcel]:
    """All of them, in as few frames as their dtypes and sizes allow, in catalogue order.

    So a pack of neighbours in the catalogue is one run of the adapter's gradient (`FlatLayout`).
    """
    filled: list[Parcel] = []
    for key in sorted(tensors, key=_catalogue_order):
        tensor = tensors[key]
        dtype, elements = _elements(tensor)
        if not filled or not filled[-1].takes(dtype, elements.nbytes):
            filled.append(Parcel(dtype))
        filled[-1].add(key, tuple(tensor.shape), elements)
    return filled


def _bytes_of(tensor: Tensor) -> memoryview:
    if tensor.numel() == 0:  # memoryview cannot cast it
        return memoryview(b"")
    contiguous = tensor.detach().cpu().contiguous()
    # numpy has no bfloat16; a tensor of no dimension cannot be viewed as bytes.
    array: Any = (contiguous if contiguous.ndim else contiguous.reshape(1)).view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def _bytes_of_all(tensors: list[Tensor]) -> list[memoryview]:
    """Views of large tensors in host memory; one copy of small ones, and one transfer from another device."""
    mean_bytes = sum(tensor.nbytes for tensor in tensors) / len(tensors)
    if mean_bytes >= VIEWED_BYTES and all(tensor.is_cpu for tensor in tensors):
        return [_bytes_of(tensor) for tensor in tensors]
    return [_bytes_of(flatten_dense_tensors(tensors))]  # type: ignore[no-untyped-call]


def from_wire(received: ReceivedTensor) -> Tensor:
    """The received tensor on its own receive buffer: no copy, writable.

    Raises ProtocolError TENSOR_INVALID for int8 blocks, which only taps may be.
    """
    dtype = _TORCH_DTYPES.get(received.dtype)
    if dtype is None:
        raise ProtocolError(
            "TENSOR_INVALID", f"{received.address.kind.name} may not be {received.dtype.name}"
        )
    return _tensor(received, dtype, received.shape)


def tap_from_wire(received: ReceivedTensor, dtype: torch.dtype) -> Tensor:
    """As `from_wire`; int8 blocks decoded to `dtype`."""
    if received.dtype is not DType.INT8_BLOCKS:
        return from_wire(received)
    payload = _tensor(received, torch.uint8, (len(received.data),))
    return dequantized(Int8Blocks(received.shape, payload), dtype)


def vector_from_wire(received: ReceivedPack) -> Tensor:
    """All elements of a pack, on the message's own memory: no copy, read only. Of int8 blocks their bytes."""
    array = np.frombuffer(received.data, dtype=_NUMPY_DTYPES[received.dtype])
    aligned = array if array.flags.aligned else array.copy()
    return torch.utils.dlpack.from_dlpack(aligned).view(_TORCH_DTYPES.get(received.dtype, torch.uint8))


def tensors_from_wire(received: ReceivedPack, dtype: torch.dtype) -> list[tuple[TensorKey, Tensor]]:
    """Every tensor of a pack, as `vector_from_wire`; int8 blocks decoded to `dtype`."""
    packed, sizes = received.contents.packed, received.contents.sizes
    vector = vector_from_wire(received)
    blocks = received.dtype is DType.INT8_BLOCKS
    parts: Sequence[Tensor] = torch.split(vector, list(sizes) if blocks else packed.sizes)
    named = zip(packed.keys, packed.shapes, parts, strict=True)
    if blocks:
        return [(key, dequantized(Int8Blocks(shape, part), dtype)) for key, shape, part in named]
    return [(key, part.view(shape)) for key, shape, part in named]


def _tensor(received: ReceivedTensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not len(received.data):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(received.data, dtype=dtype).reshape(shape)
