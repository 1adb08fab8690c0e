"""Safetensors bytes written from vectors and read as views. Torch-free.

The library's own reader and writer copy every tensor, on the way to numpy twice: of a checkpoint, 30 MB of
memory that nobody had touched yet, each time. The library reads what is written here, and what it writes is
read here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_HEADER_BYTES = 16 << 20
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_ALIGNMENT = 8  # of the first tensor, as the library has it


def write_tensors(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """The tensors one behind the other, in their order; float32 and float64 only."""
    header: dict[str, object] = {_METADATA: dict(metadata)}
    stop = 0
    for name, tensor in tensors.items():
        start, stop = stop, stop + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": (start, stop)}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    contents = [np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data for tensor in tensors.values()]
    return b"".join([struct.pack("<Q", len(encoded)), encoded, *contents])


def read_tensors(data: bytes | memoryview) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Metadata, and every tensor as a view of `data`.

    Raises ValueError, KeyError, TypeError, AttributeError or struct.error for what is no such file, whole.
    """
    (header_bytes,) = struct.unpack_from("<Q", data)
    if header_bytes > min(MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError(f"a header of {header_bytes} bytes in {len(data)} bytes")
    header = json.loads(bytes(data[8 : 8 + header_bytes]))
    contents = memoryview(data)[8 + header_bytes :]
    metadata: dict[str, str] = header.pop(_METADATA)
    tensors: dict[str, NDArray[Any]] = {}
    expected = 0  # where the next one begins: no byte is two tensors', and none is nobody's
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        if start != expected or min(shape, default=1) < 0 or stop != start + prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name!r} of shape {shape} at {start} to {stop}")
        tensors[name] = np.frombuffer(contents[start:stop], dtype).reshape(shape)
        expected = stop
    if expected != len(contents):
        raise ValueError(f"{expected} bytes of tensors in {len(contents)} bytes")
    return metadata, tensors
