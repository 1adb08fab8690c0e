"""The frame: 88 bytes of header and at most 1 MiB of payload, little endian, validated before use.

    offset size field
         0    4 magic "COLA"
         4    8 checksum: xxh3_64 of everything from offset 12 to the end of the payload
        12    1 protocol version          13  1 kind (1 tensor chunk, 2 control message, 3 pack)
        14    1 dtype code                15  1 number of dimensions (0 to 4)
        16    2 flags (0)                 18  2 site
        20    2 tensor id (TensorKind)    22  2 slot (of a registered module's parameter)
        24   16 job id, without its prefix
        40    4 epoch      44  4 version      48  4 microbatch
        52    4 payload bytes
        56   16 shape, four u32, unused ones 0
        72    8 total bytes of the tensor     80  8 offset of this chunk

A tensor's chunks come in order; chunks of different tensors may alternate. A control frame has no dtype,
shape or address: its payload is one protobuf message. A pack is many small tensors (packs.py). A stream's
message is a sequence of whole frames.
"""

from __future__ import annotations

import enum
import functools
import struct
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import xxhash

from cola_runtime.errors import ProtocolError
from cola_runtime.gradients import int8_layout
from cola_runtime.types import JOB_ID_PREFIX, TensorKind

PROTOCOL_VERSION = 7
MAGIC = b"COLA"
HEADER_BYTES = 88
MAX_PAYLOAD_BYTES = 1 << 20
MAX_MESSAGE_BYTES = MAX_PAYLOAD_BYTES + 4096  # one full frame, or many small ones
MAX_DIMENSIONS = 4
NO_JOB = bytes(16)

_CHECKED_FROM = 12
_PREFIX_FORMAT = "<4sQ"
_FIELDS_FORMAT = "<BBBBHHHH16s4I4IQQ"


class FrameKind(enum.IntEnum):
    TENSOR = 1
    CONTROL = 2
    PACK = 3


class DType(enum.IntEnum):
    """Element types on the wire. bfloat16 travels as its two bytes, blocks of int8 behind their scales."""

    FLOAT32 = 1
    FLOAT64 = 2
    BFLOAT16 = 3
    FLOAT16 = 4
    UINT8 = 5
    INT32 = 6
    INT64 = 7
    INT8_BLOCKS = 8  # gradients/int8_layout.py


ITEM_BYTES = {1: 4, 2: 8, 3: 2, 4: 2, 5: 1, 6: 4, 7: 8, 8: 1}
_INT8_BLOCKS = int(DType.INT8_BLOCKS)
_FRAME_KINDS = frozenset(map(int, FrameKind))
TENSOR_KINDS = {int(kind): kind for kind in TensorKind}
DTYPES = {int(dtype): dtype for dtype in DType}


class TensorAddress(NamedTuple):
    """Which tensor of which adapter, version and microbatch a payload belongs to.

    A named tuple, as this module's other values: built per frame, at a fifth of a frozen dataclass's cost.
    """

    job_id: str
    epoch: int
    version: int
    kind: TensorKind
    site: int = 0
    microbatch: int = 0
    slot: int = 0


class WireTensor(NamedTuple):
    """A tensor as its bytes: `data` is a C-contiguous buffer of prod(shape) elements, or its int8 blocks."""

    dtype: DType
    shape: tuple[int, ...]
    data: memoryview  # format "B", one dimension


class Header(NamedTuple):
    """The fields of a validated header, except for magic and checksum."""

    kind: int
    dtype: int
    shape: tuple[int, ...]
    site: int
    tensor: int
    slot: int
    job: bytes
    epoch: int
    version: int
    microbatch: int
    payload_bytes: int
    total_bytes: int
    offset: int


Frame = tuple[memoryview | bytes, ...]  # header and payload, not joined yet


def control_frame(payload: bytes) -> Frame:
    """One control message as a frame. Raises ProtocolError when it is larger than a frame."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ProtocolError(
            "CONTROL_TOO_LARGE",
            "a control message must fit one frame",
            limit=MAX_PAYLOAD_BYTES,
            actual=len(payload),
        )
    fields = struct.pack(
        _FIELDS_FORMAT, PROTOCOL_VERSION, FrameKind.CONTROL, 0, 0, 0, 0, 0, 0, NO_JOB, 0, 0, 0, len(payload),
        0, 0, 0, 0, len(payload), 0,
    )  # fmt: skip
    return _with_checksum(fields, payload), payload


def tensor_frames(address: TensorAddress, tensor: WireTensor) -> Iterator[Frame]:
    """The tensor's chunks in order; payloads are views of `tensor.data`, which must not change until sent."""
    total = len(tensor.data)
    for offset in range(0, max(total, 1), MAX_PAYLOAD_BYTES):
        payload = tensor.data[offset : offset + MAX_PAYLOAD_BYTES]
        header = frame_header(
            FrameKind.TENSOR, address, tensor.dtype, payload, shape=tensor.shape, total=total, offset=offset
        )
        yield header, payload


def tensor_wire_bytes(data_bytes: int) -> int:
    """Bytes that a tensor of `data_bytes` takes on the stream, headers included."""
    return data_bytes + HEADER_BYTES * max(1, -(-data_bytes // MAX_PAYLOAD_BYTES))


def decode_header(message: bytes, start: int) -> Header:
    """The header at `start`, after every check that one frame alone allows, checksum included.

    Raises ProtocolError: FRAME_TRUNCATED, FRAME_MAGIC, FRAME_VERSION, FRAME_KIND, FRAME_TOO_LARGE,
    FRAME_CHECKSUM or FRAME_FIELDS.
    """
    if len(message) - start < HEADER_BYTES:
        raise ProtocolError("FRAME_TRUNCATED", f"{len(message) - start} bytes are no header")
    magic, checksum = struct.unpack_from(_PREFIX_FORMAT, message, start)
    fields = struct.unpack_from(_FIELDS_FORMAT, message, start + _CHECKED_FROM)
    version, kind, dtype, dimensions, flags, site, tensor, slot = fields[:8]
    job, epoch, step, microbatch, payload = fields[8:13]
    if magic != MAGIC:
        raise ProtocolError("FRAME_MAGIC", f"a frame begins with {MAGIC!r}, got {magic!r}")
    if version != PROTOCOL_VERSION:
        raise ProtocolError("FRAME_VERSION", "unknown frame version", limit=PROTOCOL_VERSION, actual=version)
    if payload > MAX_PAYLOAD_BYTES:
        raise ProtocolError("FRAME_TOO_LARGE", "payload too large", limit=MAX_PAYLOAD_BYTES, actual=payload)
    end = start + HEADER_BYTES + payload
    if end > len(message):
        raise ProtocolError("FRAME_TRUNCATED", f"{end - len(message)} bytes of the payload are missing")
    if xxhash.xxh3_64_intdigest(memoryview(message)[start + _CHECKED_FROM : end]) != checksum:
        raise ProtocolError("FRAME_CHECKSUM", "checksum mismatch: the frame was damaged on its way")
    if kind not in _FRAME_KINDS:
        raise ProtocolError("FRAME_KIND", f"unknown frame kind {kind}")
    if flags or dimensions > MAX_DIMENSIONS or any(fields[13 + dimensions : 17]):
        raise ProtocolError("FRAME_FIELDS", f"flags {flags}, {dimensions} dimensions")
    return Header(
        kind, dtype, fields[13 : 13 + dimensions], site, tensor, slot, job, epoch, step, microbatch, payload,
        fields[17], fields[18],
    )  # fmt: skip


def check_tensor_header(header: Header) -> None:
    """Raise ProtocolError TENSOR_INVALID unless dtype, shape, total and chunk agree with one another."""
    if header.dtype not in ITEM_BYTES or header.tensor not in TENSOR_KINDS:
        raise ProtocolError("TENSOR_INVALID", f"unknown dtype {header.dtype} or tensor id {header.tensor}")
    if element_bytes(header.dtype, header.shape) != header.total_bytes:
        raise ProtocolError(
            "TENSOR_INVALID", f"{header.shape} of dtype {header.dtype} is not {header.total_bytes} bytes"
        )
    if header.offset + header.payload_bytes > header.total_bytes:
        raise ProtocolError("TENSOR_INVALID", f"a chunk ends beyond the tensor's {header.total_bytes} bytes")
    if header.payload_bytes == 0 and header.total_bytes > 0:
        raise ProtocolError("TENSOR_INVALID", "an empty chunk of a tensor that is not empty")


def element_bytes(dtype: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of a known dtype on the wire, without headers."""
    elements = prod(shape)
    scales = int8_layout.scales_bytes(elements) if dtype == _INT8_BLOCKS else 0
    return elements * ITEM_BYTES[dtype] + scales


def tensor_address(header: Header) -> TensorAddress:
    """The address in a checked tensor header."""
    job_id, kind = _job_id(header.job), TENSOR_KINDS[header.tensor]
    return TensorAddress(
        job_id, header.epoch, header.version, kind, header.site, header.microbatch, header.slot
    )


def frame_header(
    kind: FrameKind,
    address: TensorAddress,
    dtype: DType,
    *payload: memoryview | bytes,
    shape: tuple[int, ...] = (),
    total: int | None = None,
    offset: int = 0,
) -> bytes:
    """Header of a tensor's chunk or of a pack; without `total`, the payload is all of it."""
    payload_bytes = sum(map(len, payload))
    fields = struct.pack(
        _FIELDS_FORMAT, PROTOCOL_VERSION, kind, dtype, len(shape), 0, address.site, address.kind,
        address.slot, _job_bytes(address.job_id), address.epoch, address.version, address.microbatch,
        payload_bytes, *shape, *(0,) * (MAX_DIMENSIONS - len(shape)),
        payload_bytes if total is None else total, offset,
    )  # fmt: skip
    return _with_checksum(fields, *payload)


def _with_checksum(fields: bytes, *payload: memoryview | bytes) -> bytes:
    digest = xxhash.xxh3_64(fields)
    for part in payload:
        digest.update(part)
    return struct.pack(_PREFIX_FORMAT, MAGIC, digest.intdigest()) + fields


@functools.lru_cache(maxsize=4096)
def _job_bytes(job_id: str) -> bytes:
    if not job_id.startswith(JOB_ID_PREFIX) or len(job_id) != len(JOB_ID_PREFIX) + 32:
        raise ValueError(f"a job id is {JOB_ID_PREFIX!r} and 32 hexadecimal digits, got {job_id!r}")
    return bytes.fromhex(job_id[len(JOB_ID_PREFIX) :])


@functools.lru_cache(maxsize=4096)
def _job_id(job: bytes) -> str:
    return JOB_ID_PREFIX + job.hex()
