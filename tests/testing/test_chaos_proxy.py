"""Each fault does to a real stream what its name says, and nothing happens without one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from cola_runtime.errors import ColaError, ProtocolError
from cola_runtime.proto import control_pb2
from cola_runtime.testing.chaos import Chaos, FaultKind, StreamFault, Way
from cola_runtime.testing.chaos_proxy import byte_proxy, frame_proxy
from cola_runtime.transport.endpoints import GRADIENTS, Connection, OnStream, connect, serve_streams
from cola_runtime.transport.frames import TensorAddress
from cola_runtime.transport.reader import FrameLimits, ReceivedTensor
from cola_runtime.transport.stream import FrameStream
from cola_runtime.transport.tensors import to_wire
from cola_runtime.types import TensorKind

JOB_ID = "job-" + "ab" * 16
PROXIES = {"bytes": byte_proxy, "frames": frame_proxy}


async def echo(stream: FrameStream[Any]) -> None:
    """Send back the site of every tensor that arrived, as credit."""
    stream.accept_tensors(FrameLimits())
    async for item in stream:
        if isinstance(item, ReceivedTensor):
            credit = control_pb2.Credit(bytes=item.address.site)
            await stream.send_control(control_pb2.GradientControl(credit=credit))


async def echo_and_goodbye(stream: FrameStream[Any]) -> None:
    await echo(stream)
    await stream.send_control(control_pb2.GradientControl(credit=control_pb2.Credit(bytes=999)))


@asynccontextmanager
async def through(proxy: str, chaos: Chaos, serve: OnStream = echo) -> AsyncIterator[Connection[Any]]:
    server, endpoint = await serve_streams("127.0.0.1:0", {GRADIENTS: serve})
    try:
        async with PROXIES[proxy](endpoint, chaos) as harmed:
            stream = await connect(harmed, GRADIENTS)
            try:
                yield stream
            finally:
                chaos.clear()
                await stream.close()
    finally:
        await server.stop(0)


async def send(stream: Connection[Any], *sites: int) -> None:
    for site in sites:
        address = TensorAddress(job_id=JOB_ID, epoch=1, version=0, kind=TensorKind.BIAS, site=site)
        await stream.send_tensor(address, to_wire(torch.ones(3)))
        await stream.flush()


async def heard(stream: Connection[Any], count: int) -> list[int]:
    return [(await stream.receive_one(timeout_seconds=10)).message.credit.bytes for _ in range(count)]


async def ping_pong(stream: Connection[Any], count: int) -> None:
    for site in range(count):
        await send(stream, site)
        await heard(stream, 1)


def fault(kind: FaultKind, **more: Any) -> StreamFault:
    return StreamFault(kind=kind, way=Way.TO_SERVER, at=2, **more)


@pytest.mark.parametrize("proxy", PROXIES)
async def test_without_a_fault_everything_passes(proxy: str) -> None:
    chaos = Chaos()
    async with through(proxy, chaos) as stream:
        await send(stream, 1, 2, 3)
        assert await heard(stream, 3) == [1, 2, 3]
        assert chaos.units[Way.TO_SERVER] >= 3
        assert not chaos.struck.is_set()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (FaultKind.DROP, [1, 3, 4]),
        (FaultKind.DUPLICATE, [1, 2, 2, 3, 4]),
        (FaultKind.REORDER, [1, 3, 2, 4]),
        (FaultKind.DELAY, [1, 2, 3, 4]),
        (FaultKind.THROTTLE, [1, 2, 3, 4]),
    ],
)
async def test_a_frame_is_lost_doubled_swapped_or_late(kind: FaultKind, expected: list[int]) -> None:
    chaos = Chaos(fault(kind, bytes_per_second=10_000))
    async with through("frames", chaos) as stream:
        await send(stream, 1, 2, 3, 4)
        assert await heard(stream, len(expected)) == expected
        assert chaos.struck.is_set()


async def test_a_damaged_frame_is_refused_by_its_receiver() -> None:
    async with through("frames", Chaos(fault(FaultKind.CORRUPT))) as stream:
        await send(stream, 1, 2)
        assert await heard(stream, 1) == [1]
        with pytest.raises(ProtocolError) as caught:
            await heard(stream, 1)
        assert caught.value.reason == "FRAME_CHECKSUM"


@pytest.mark.parametrize("proxy", PROXIES)
async def test_a_cut_ends_both_ways(proxy: str) -> None:
    async with through(proxy, Chaos(StreamFault(kind=FaultKind.CUT, way=Way.TO_CLIENT, at=3))) as stream:
        with pytest.raises(ColaError):
            await ping_pong(stream, 20)


async def test_a_half_closed_way_ends_and_the_other_stays() -> None:
    async with through("frames", Chaos(fault(FaultKind.HALF_CLOSE)), echo_and_goodbye) as stream:
        await send(stream, 1, 2)
        assert await heard(stream, 2) == [1, 999]


@pytest.mark.parametrize("proxy", PROXIES)
async def test_a_stalled_way_goes_on_when_it_is_cleared(proxy: str) -> None:
    chaos = Chaos(fault(FaultKind.STALL))
    async with through(proxy, chaos) as stream:
        sending = asyncio.create_task(send(stream, 1, 2, 3, 4))
        await asyncio.wait_for(chaos.struck.wait(), 10)
        chaos.clear()
        await sending
        assert await heard(stream, 4) == [1, 2, 3, 4]


@pytest.mark.parametrize("proxy", PROXIES)
async def test_a_fault_can_be_called_for_while_all_is_well(proxy: str) -> None:
    chaos = Chaos()
    async with through(proxy, chaos) as stream:
        await ping_pong(stream, 2)
        chaos.strike_next(FaultKind.CUT, Way.TO_SERVER)
        with pytest.raises(ColaError):
            await ping_pong(stream, 2)
        assert chaos.struck.is_set()
