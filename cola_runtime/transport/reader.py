"""From stream messages to whole tensors and control payloads, with bounded memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cola_runtime.errors import ProtocolError
from cola_runtime.machine import ALIGNMENT_BYTES
from cola_runtime.transport.frames import (
    DTYPES,
    HEADER_BYTES,
    DType,
    FrameKind,
    Header,
    TensorAddress,
    check_tensor_header,
    decode_header,
    tensor_address,
)
from cola_runtime.transport.packs import PackIndexes, ReceivedPack


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameLimits:
    """What one stream may make its receiver allocate."""

    max_tensor_bytes: int = 1 << 30
    max_open_tensors: int = 16
    max_open_bytes: int = 2 << 30
    packs: bool = False  # where many small tensors are expected
    tensor_seconds: float = 600.0
    """From a tensor's first chunk to its last."""


_CONTROL, _PACK = int(FrameKind.CONTROL), int(FrameKind.PACK)
NO_TENSORS = FrameLimits(max_tensor_bytes=0, max_open_tensors=0, max_open_bytes=0)


class ReceivedTensor(NamedTuple):
    """A whole tensor. `data` is a writable buffer of its own, that nobody else refers to."""

    address: TensorAddress
    dtype: DType
    shape: tuple[int, ...]
    data: memoryview
    wire_bytes: int


@dataclass(frozen=True, slots=True)
class ControlPayload:
    payload: bytes
    wire_bytes: int


@dataclass(slots=True)
class _OpenTensor:
    header: Header  # of the first chunk
    data: memoryview
    began: float
    filled: int = 0
    wire_bytes: int = 0


_Name = tuple[bytes, int, int, int, int, int, int]


class FrameReader:
    """Reassembles tensors. One reader per stream; a ProtocolError from it ends the stream."""

    def __init__(self, limits: FrameLimits) -> None:
        self.limits = limits
        self._open: dict[_Name, _OpenTensor] = {}
        self._open_bytes = 0
        self._indexes = PackIndexes()

    def feed(self, message: bytes) -> list[ReceivedTensor | ReceivedPack | ControlPayload]:
        """Everything that `message` completes, in order. Raises ProtocolError at the first bad frame."""
        received: list[ReceivedTensor | ReceivedPack | ControlPayload] = []
        view = memoryview(message)
        start = 0
        self.check_age()
        while start < len(message):
            header = decode_header(message, start)
            end = start + HEADER_BYTES + header.payload_bytes
            payload = view[start + HEADER_BYTES : end]
            start = end
            if header.kind == _CONTROL:
                received.append(_control(header, payload))
            elif header.kind == _PACK:
                received.append(self._pack(header, payload))
            elif (tensor := self._chunk(header, payload)) is not None:
                received.append(tensor)
        return received

    @property
    def incomplete(self) -> bool:
        """A tensor has begun and not ended."""
        return bool(self._open)

    def check_age(self) -> None:
        """Raises ProtocolError TENSOR_STALLED if one began too long ago: memory is not held for nothing."""
        if not self._open:
            return
        age = time.monotonic() - next(iter(self._open.values())).began  # the oldest: dicts keep their order
        if age > self.limits.tensor_seconds:
            raise ProtocolError(
                "TENSOR_STALLED",
                "a tensor's chunks stopped coming",
                limit=f"{self.limits.tensor_seconds:g} s",
            )

    def _chunk(self, header: Header, payload: memoryview) -> ReceivedTensor | None:
        check_tensor_header(header)
        if header.payload_bytes == header.total_bytes and not self._open:
            return self._whole(header, payload)
        name = (
            header.job,
            header.epoch,
            header.version,
            header.microbatch,
            header.site,
            header.tensor,
            header.slot,
        )
        opened = self._open.get(name) or self._begin(name, header)
        _check_continues(opened, header)
        opened.data[opened.filled : opened.filled + len(payload)] = payload
        opened.filled += len(payload)
        opened.wire_bytes += HEADER_BYTES + len(payload)
        return self._finish(name, opened) if opened.filled == header.total_bytes else None

    def _whole(self, header: Header, payload: memoryview) -> ReceivedTensor:
        """A tensor of one chunk, which is what a small one is: the same checks, no bookkeeping."""
        _check_room(self.limits, header, open_tensors=0, open_bytes=0)
        data = _buffer(len(payload))
        data[:] = payload
        return ReceivedTensor(
            tensor_address(header), DTYPES[header.dtype], header.shape, data, HEADER_BYTES + len(payload)
        )

    def _pack(self, header: Header, payload: memoryview) -> ReceivedPack:
        if not self.limits.packs:
            raise ProtocolError("PACK_UNEXPECTED", "no packs of tensors travel this way")
        index = self._indexes.of(header, payload)
        _check_room(self.limits, header, open_tensors=len(self._open), open_bytes=self._open_bytes)
        data = payload[len(payload) - index.data_bytes :]
        address = tensor_address(header)._replace(slot=index.packed.keys[0].slot)
        return ReceivedPack(address, DTYPES[header.dtype], index, data, HEADER_BYTES + len(payload))

    def _begin(self, name: _Name, header: Header) -> _OpenTensor:
        _check_room(self.limits, header, open_tensors=len(self._open), open_bytes=self._open_bytes)
        opened = _OpenTensor(header, _buffer(header.total_bytes), time.monotonic())
        self._open[name] = opened
        self._open_bytes += header.total_bytes
        return opened

    def _finish(self, name: _Name, opened: _OpenTensor) -> ReceivedTensor:
        del self._open[name]
        header = opened.header
        self._open_bytes -= header.total_bytes
        return ReceivedTensor(
            tensor_address(header), DTYPES[header.dtype], header.shape, opened.data, opened.wire_bytes
        )


def _buffer(nbytes: int) -> memoryview:
    """Uninitialized, at a multiple of `ALIGNMENT_BYTES`."""
    memory = np.empty(nbytes + ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    return memoryview(memory[start : start + nbytes])  # type: ignore[arg-type]


def _control(header: Header, payload: memoryview) -> ControlPayload:
    if header.total_bytes != header.payload_bytes or header.offset or header.shape or header.dtype:
        raise ProtocolError("FRAME_FIELDS", "a control frame carries one whole message and no shape")
    return ControlPayload(bytes(payload), HEADER_BYTES + len(payload))


def _check_room(limits: FrameLimits, header: Header, *, open_tensors: int, open_bytes: int) -> None:
    if header.offset != 0:
        raise ProtocolError("TENSOR_OUT_OF_ORDER", f"a tensor begins at offset 0, not {header.offset}")
    if header.total_bytes > limits.max_tensor_bytes:
        raise ProtocolError(
            "TENSOR_TOO_LARGE", "tensor too large", limit=limits.max_tensor_bytes, actual=header.total_bytes
        )
    if open_tensors >= limits.max_open_tensors or open_bytes + header.total_bytes > limits.max_open_bytes:
        raise ProtocolError(
            "TOO_MANY_OPEN_TENSORS",
            f"{open_tensors} tensors with {open_bytes} bytes are incomplete",
            limit=f"{limits.max_open_tensors} tensors, {limits.max_open_bytes} bytes",
        )


def _check_continues(opened: _OpenTensor, header: Header) -> None:
    first = opened.header
    if header.dtype != first.dtype or header.shape != first.shape:
        raise ProtocolError("TENSOR_INVALID", "a chunk disagrees with the first one of its tensor")
    if header.offset != opened.filled:
        raise ProtocolError(
            "TENSOR_OUT_OF_ORDER",
            "a chunk is missing or doubled",
            limit=opened.filled,
            actual=header.offset,
        )
