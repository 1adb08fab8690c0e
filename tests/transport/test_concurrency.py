"""Who is cancelled ends, also in the middle of closing a stream; nothing of it lives on."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from cola_runtime.proto import control_pb2
from cola_runtime.transport import concurrency
from cola_runtime.transport.concurrency import until_first_ends
from cola_runtime.transport.stream import FrameStream


class DeafPipe:
    """Its writer takes a moment to end."""

    async def read(self) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    async def write(self, message: bytes) -> None:
        raise AssertionError


async def slow_to_end() -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0.05)


async def test_a_cancellation_while_a_stream_closes_is_not_lost() -> None:
    stream: FrameStream[control_pb2.GradientControl] = FrameStream(
        DeafPipe(), control_pb2.GradientControl, peer="nobody"
    )
    stream._writer.cancel()
    stream._writer = asyncio.create_task(slow_to_end())
    await asyncio.sleep(0)
    closing = asyncio.create_task(stream.close())
    await asyncio.sleep(0.01)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing


async def test_a_part_that_loses_its_cancellation_does_not_hold_up_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(concurrency, "CANCEL_AGAIN_SECONDS", 0.01)

    async def loses_one() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    async def ends() -> None:
        raise ConnectionError("gone")

    async with asyncio.timeout(5):
        with pytest.raises(ConnectionError):
            await until_first_ends(loses_one(), ends())
