"""Damaged frames into the reader, and hostile streams into a real coordinator's pool."""

from __future__ import annotations

import asyncio
import random
import struct
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import xxhash

from cola_runtime.config import DeviceSettings
from cola_runtime.errors import ProtocolError
from cola_runtime.jobs.store import JobStore
from cola_runtime.proto import control_pb2
from cola_runtime.reasons import REASONS
from cola_runtime.scheduler.device_gate import DeviceGate
from cola_runtime.scheduler.device_pool import DevicePool
from cola_runtime.scheduler.leases import LeaseBook
from cola_runtime.transport.endpoints import DEVICES, serve_streams
from cola_runtime.transport.frames import (
    HEADER_BYTES,
    PROTOCOL_VERSION,
    DType,
    TensorAddress,
    WireTensor,
    control_frame,
    tensor_frames,
)
from cola_runtime.transport.packs import PackedTensors, ReceivedPack, pack_frame, pack_index
from cola_runtime.transport.reader import FrameLimits, FrameReader, ReceivedTensor
from cola_runtime.transport.status import error_from_rpc
from cola_runtime.types import TensorKey, TensorKind
from tests.fuzz.messages import NUMBERS, Messages
from tests.fuzz.vitals import check_came_back, vitals

LIMITS = FrameLimits(max_tensor_bytes=1 << 16, max_open_tensors=4, max_open_bytes=1 << 17, packs=True)
STREAM_SECONDS = 20.0
CONTROL = control_pb2.DESCRIPTOR.message_types_by_name["DeviceControl"]


class Frames:
    """Draws messages of frames, good ones damaged in one place; with a right checksum, or a wrong one."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def good(self) -> bytes:
        draw = self.draw
        if draw.random() < 0.3:
            return b"".join(map(bytes, control_frame(draw.randbytes(draw.randrange(100)))))
        size = draw.choice([0, 1, 4, 100, 5000])
        address = TensorAddress(
            job_id=f"job-{draw.getrandbits(128):032x}",
            epoch=draw.getrandbits(32),
            version=draw.getrandbits(32),
            kind=draw.choice(list(TensorKind)),
            site=draw.randrange(2**16 - 1),  # a pack has the next one too
        )
        if draw.random() < 0.3:
            return self._pack(address)
        tensor = WireTensor(dtype=DType.UINT8, shape=(size,), data=memoryview(draw.randbytes(size)))
        return b"".join(bytes(part) for frame in tensor_frames(address, tensor) for part in frame)

    def _pack(self, address: TensorAddress) -> bytes:
        keys = tuple(TensorKey(address.site + number, address.kind) for number in range(2))
        index = pack_index(keys, ((3,), (2, 2)))
        tensors = PackedTensors(DType.UINT8, index, [memoryview(self.draw.randbytes(n)) for n in (3, 4)])
        return b"".join(bytes(part) for part in pack_frame(address, tensors))

    def bad(self) -> bytes:
        draw, frame = self.draw, bytearray(self.good())
        for _ in range(draw.randrange(1, 4)):
            self._damage(frame)
        if len(frame) >= HEADER_BYTES and draw.random() < 0.8:  # so that the checks behind it are reached
            struct.pack_into("<Q", frame, 4, xxhash.xxh3_64_intdigest(bytes(frame[12:])))
        return bytes(frame) if draw.random() < 0.9 else bytes(frame) + self.good()

    def _damage(self, frame: bytearray) -> None:
        draw = self.draw
        if not frame:
            return
        match draw.randrange(4):
            case 0:
                frame[draw.randrange(len(frame))] ^= 1 << draw.randrange(8)
            case 1:
                del frame[draw.randrange(len(frame)) :]
            case 2:
                offset = draw.choice([12, 13, 14, 15, 16, 52, 56, 60, 64, 68, 72, 80, *range(88, 152, 4)])
                value = draw.choice(NUMBERS) % 2**64
                raw = struct.pack("<Q", value)[: draw.choice([1, 4, 8])]
                frame[offset : offset + len(raw)] = raw
            case _:
                frame += draw.randbytes(draw.randrange(200))


@pytest.mark.timeout(1800)
def test_no_damaged_frame_gets_through_or_crashes_the_reader(request: pytest.FixtureRequest) -> None:
    count = 100_000 if request.config.getoption("--fuzz") else 4_000
    frames, ended, began = Frames(3), Counter[str](), time.monotonic()
    loop = asyncio.new_event_loop()
    before = vitals(loop)
    reader = FrameReader(LIMITS)
    for _ in range(count):
        try:
            for item in reader.feed(frames.bad()):
                if isinstance(item, ReceivedTensor | ReceivedPack):
                    assert len(item.data) <= LIMITS.max_tensor_bytes
                ended["taken"] += 1
        except ProtocolError as error:
            ended[error.reason] += 1
            reader = FrameReader(LIMITS)  # as a stream ends at its first bad frame
    after = vitals(loop)
    loop.close()
    seconds = time.monotonic() - began
    print(f"\n{count} frames in {seconds:.0f} s: {dict(ended.most_common())}\n{before}\n{after}")
    check_came_back(before, after)
    assert ended.keys() - {"taken"} <= REASONS.keys()
    assert len(ended) >= 8, "the checks behind the checksum are reached"
    assert ended["PACK_INVALID"] > count // 100


class Hostile:
    """Opens streams to a pool's port and sends what no device sends."""

    def __init__(self, endpoint: str, seed: int) -> None:
        self.ended: Counter[str] = Counter()
        self._endpoint, self._frames = endpoint, Frames(seed)
        self._messages = Messages(seed, ["secret", "evil"])

    async def run(self, count: int) -> None:
        places = asyncio.Semaphore(16)

        async def one() -> None:
            async with places:
                await self._one()

        async with grpc.aio.insecure_channel(self._endpoint) as channel:
            self._attach = channel.stream_stream(DEVICES.path)
            await asyncio.gather(*(one() for _ in range(count)))

    async def _one(self) -> None:
        call, draw = self._attach(timeout=STREAM_SECONDS), self._frames.draw
        try:
            if draw.random() < 0.7:
                hello = control_pb2.DeviceHello(
                    device_id=f"evil-{draw.randrange(8)}",
                    join_token="secret",
                    protocol_version=PROTOCOL_VERSION,
                )
                await call.write(_frame(control_pb2.DeviceControl(hello=hello)))
            for _ in range(draw.randrange(6)):
                await call.write(self._next())
            await call.done_writing()
            while await call.read() is not grpc.aio.EOF:
                pass
            self.ended["closed"] += 1
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            code = await call.code()
            error = error_from_rpc(_Ended(code, await call.details(), await call.trailing_metadata()))
            self.ended[error.reason] += 1
            assert error.reason in REASONS or code is grpc.StatusCode.RESOURCE_EXHAUSTED, error
            assert error.reason != "INTERNAL", error
        finally:
            call.cancel()

    def _next(self) -> bytes:
        match self._frames.draw.randrange(3):
            case 0:
                return self._frames.bad()
            case 1:
                return self._frames.good()
            case _:
                return _frame(self._messages.message(CONTROL))


class _Ended(grpc.RpcError):
    """How a call ended, in the form that error_from_rpc reads."""

    def __init__(self, code: Any, details: Any, trailing: Any) -> None:
        super().__init__()
        self._code, self._details, self._trailing = code, details, trailing

    def code(self) -> Any:
        return self._code

    def details(self) -> Any:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._trailing


def _frame(message: Any) -> bytes:
    return b"".join(map(bytes, control_frame(message.SerializeToString())))


@pytest.mark.timeout(1800)
async def test_no_hostile_stream_crashes_hangs_or_leaks(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    count = 3_000 if request.config.getoption("--fuzz") else 60
    store = await JobStore.open(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    pool = DevicePool(
        DeviceSettings(),
        gate=DeviceGate(store.devices, join_token="secret"),
        audit=store.audit,
        book=LeaseBook(),
    )
    server, endpoint = await serve_streams("127.0.0.1:0", {DEVICES: pool.on_stream})
    await Hostile(endpoint, 4).run(min(count, 200))
    await asyncio.sleep(0.2)
    before, began = vitals(asyncio.get_running_loop()), time.monotonic()
    hostile = Hostile(endpoint, 5)
    await hostile.run(count)
    await asyncio.sleep(0.5)
    after = vitals(asyncio.get_running_loop())
    seconds = time.monotonic() - began
    print(f"\n{count} streams in {seconds:.0f} s: {dict(hostile.ended.most_common())}\n{before}\n{after}")
    check_came_back(before, after)
    assert pool.statuses() == [], "nobody is left"
    assert len(hostile.ended) > 5
    await server.stop(0)
    await store.close()
