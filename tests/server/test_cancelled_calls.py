"""A call that is cancelled ends, whatever it was just doing: else it would count as its host's for good."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cola_runtime.proto import jobs_pb2
from cola_runtime.server.limits import Limits
from cola_runtime.server.rpc import RpcHandlers
from cola_runtime.server.rules import Owner, Rule

SECONDS = 10.0


class Context:
    """Of a call; `sent` is when its one response has gone out."""

    def __init__(self) -> None:
        self.sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def peer(self) -> str:
        return "ipv4:192.0.2.1:50000"

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def write(self, _response: object) -> None:
        await self.sent


async def test_a_stream_that_is_cancelled_in_the_moment_a_response_has_gone_out_ends() -> None:
    """asyncio.wait_for of Python 3.11 takes such a cancellation for the response's end, and goes on."""

    async def responses(_request: object, _call: object) -> AsyncIterator[object]:
        yield object()
        await asyncio.get_running_loop().create_future()

    store: Any = None
    handlers, context = RpcHandlers(store, store, Limits()), Context()
    serve = handlers._streaming(responses, Rule(scope="", owner=Owner.NEWCOMER))
    serving = asyncio.create_task(serve(jobs_pb2.WatchEventsRequest(), context))
    for _ in range(5):
        await asyncio.sleep(0)
    context.sent.set_result(None)
    await asyncio.sleep(0)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(SECONDS):
            await asyncio.shield(serving)
