"""torch tensors to and from their bytes on the wire, without a copy where the memory allows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cola_runtime.errors import ProtocolError
from cola_runtime.gradients.compression import Compressed, Int8Blocks, dequantized
from cola_runtime.transport.frames import MAX_DIMENSIONS, DType, WireTensor
from cola_runtime.transport.reader import ReceivedTensor

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
    if isinstance(tensor, Int8Blocks):
        return WireTensor(dtype=DType.INT8_BLOCKS, shape=tensor.shape, data=_bytes_of(tensor.payload))
    dtype = _WIRE_DTYPES.get(tensor.dtype)
    if dtype is None or tensor.ndim > MAX_DIMENSIONS:
        raise ProtocolError("TENSOR_INVALID", f"cannot send {tensor.ndim} dimensions of {tensor.dtype}")
    return WireTensor(dtype=dtype, shape=tuple(tensor.shape), data=_bytes_of(tensor))


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


def _tensor(received: ReceivedTensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not len(received.data):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(received.data, dtype=dtype).reshape(shape)
