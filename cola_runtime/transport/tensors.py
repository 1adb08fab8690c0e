"""torch tensors to and from their bytes on the wire, without a copy where the memory allows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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
_WIRE_DTYPES = {dtype: code for code, dtype in _TORCH_DTYPES.items()}


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
    """Tensors of one address that leave together: a pack, or one tensor alone. Copied only by `frames`."""

    def __init__(self, dtype: DType) -> None:
        self.dtype = dtype
        self._tensors: dict[TensorKey, Compressed] = {}
        self._data_bytes = 0

    def takes(self, dtype: DType, data_bytes: int) -> bool:
        """One more tensor like this fits into the same frame."""
        count = len(self._tensors) + 1
        room = MAX_PAYLOAD_BYTES - self._data_bytes - count * ENTRY_BYTES
        return dtype is self.dtype and data_bytes <= room and count <= MAX_PACKED_TENSORS

    def add(self, key: TensorKey, tensor: Compressed, data_bytes: int) -> None:
        self._tensors[key] = tensor
        self._data_bytes += data_bytes

    @property
    def wire_bytes(self) -> int:
        """On the stream, headers included."""
        count = len(self._tensors)
        if count == 1:
            return tensor_wire_bytes(self._data_bytes)
        return HEADER_BYTES + count * ENTRY_BYTES + self._data_bytes

    def frames(self, address: TensorAddress) -> list[Frame]:
        """`address` says all but which tensor it is."""
        first, *others = self._tensors
        address = address._replace(site=first.site, kind=first.kind, slot=first.slot)
        if not others:
            return list(tensor_frames(address, to_wire(self._tensors[first])))
        elements = [_elements(tensor)[1].detach().reshape(-1) for tensor in self._tensors.values()]
        index = pack_index(self._tensors, (tuple(tensor.shape) for tensor in self._tensors.values()))
        return [pack_frame(address, PackedTensors(self.dtype, index, _bytes_of(torch.cat(elements))))]


def parcels(tensors: Mapping[TensorKey, Compressed]) -> list[Parcel]:
    """All of them, in as few frames as their dtypes and sizes allow; gradients in catalogue order.

    Of neighbours in the catalogue a pack holds one run of the adapter's gradient (`FlatLayout`).
    """
    filled: list[Parcel] = []
    for key in sorted(tensors, key=lambda key: (key.site, key.kind, key.slot)):
        dtype, elements = _elements(tensors[key])
        data_bytes = elements.numel() * elements.itemsize
        if not filled or not filled[-1].takes(dtype, data_bytes):
            filled.append(Parcel(dtype))
        filled[-1].add(key, tensors[key], data_bytes)
    return filled


def _bytes_of(tensor: Tensor) -> memoryview:
    if tensor.numel() == 0:  # memoryview cannot cast it
        return memoryview(b"")
    contiguous = tensor.detach().cpu().contiguous()
    # numpy has no bfloat16; a tensor of no dimension cannot be viewed as bytes.
    array: Any = (contiguous if contiguous.ndim else contiguous.reshape(1)).view(torch.uint8).numpy()
    return memoryview(array).cast("B")


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
    """All elements of a pack, on its own receive buffer: no copy. Not for int8 blocks."""
    dtype = _TORCH_DTYPES[received.dtype]
    return torch.frombuffer(received.data, dtype=dtype) if len(received.data) else torch.empty(0, dtype=dtype)


def tensors_from_wire(received: ReceivedPack, dtype: torch.dtype) -> list[tuple[TensorKey, Tensor]]:
    """Every tensor of a pack; int8 blocks decoded to `dtype`."""
    packed, sizes = received.contents.packed, received.contents.sizes
    empty = torch.empty(0, dtype=torch.uint8)
    payload = torch.frombuffer(received.data, dtype=torch.uint8) if len(received.data) else empty
    parts: Sequence[Tensor] = torch.split(payload, list(sizes))
    named = zip(packed.keys, packed.shapes, parts, strict=True)
    if received.dtype is DType.INT8_BLOCKS:
        return [(key, dequantized(Int8Blocks(shape, part), dtype)) for key, shape, part in named]
    of_wire = _TORCH_DTYPES[received.dtype]
    return [(key, part.view(of_wire).view(shape)) for key, shape, part in named]


def _tensor(received: ReceivedTensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not len(received.data):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(received.data, dtype=dtype).reshape(shape)
