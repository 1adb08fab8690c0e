"""One connection to a service: calls by name, each with the key, a deadline and bounded retries."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio

from cola_runtime.client.channel import call_metadata, explained, open_channel, parse_base_url
from cola_runtime.config import ClientSettings
from cola_runtime.errors import ColaError
from cola_runtime.proto import jobs_pb2_grpc, operators_pb2_grpc
from cola_runtime.transport.status import error_from_rpc

CALL_TIMEOUT_SECONDS = 60.0
RETRY_DELAYS_SECONDS = (0.1, 0.3, 0.9, 2.0)


class Connection:
    """Speaks cola.v1.Jobs and Operators. The channel opens with the first call, on that call's event loop."""

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings
        self._metadata = call_metadata(settings)
        self._target = parse_base_url(settings.base_url).target
        self._channel: grpc.aio.Channel | None = None

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def call(
        self,
        rpc: str,
        request: Any,
        *,
        timeout_seconds: float = CALL_TIMEOUT_SECONDS,
        retry: bool = True,
    ) -> Any:
        """The answer. With `retry`, what is retryable is tried again, once after each of the delays.

        `request` is a message, or a function that gives the messages of a client stream for one attempt.
        """
        for delay_seconds in (*(RETRY_DELAYS_SECONDS if retry else ()), None):
            try:
                return await self._attempt(rpc, request, timeout_seconds)
            except grpc.aio.AioRpcError as failure:
                error = error_from_rpc(failure)
                told = explained(error, self._target)
                if delay_seconds is None or not _worth_retrying(told):
                    raise told from failure
            await asyncio.sleep(delay_seconds * random.uniform(0.5, 1.0))  # noqa: S311 (spreads retries)
        raise AssertionError("the last attempt returns or raises")

    async def stream(
        self, rpc: str, request: Any, *, timeout_seconds: float | None = None
    ) -> AsyncIterator[Any]:
        """The messages of a server stream; leaving the loop early ends the call."""
        call = self._method(rpc)(request, metadata=self._metadata, timeout=timeout_seconds)
        try:
            async for item in call:
                yield item
        except grpc.aio.AioRpcError as failure:
            raise explained(error_from_rpc(failure), self._target) from failure
        finally:
            call.cancel()

    async def _attempt(
        self, rpc: str, request: Any | Callable[[], AsyncIterator[Any]], timeout_seconds: float
    ) -> Any:
        sent = request() if callable(request) else request
        return await self._method(rpc)(sent, metadata=self._metadata, timeout=timeout_seconds)

    def _method(self, name: str) -> Any:
        if self._channel is None:
            self._channel = open_channel(self._settings)
        stubs = (jobs_pb2_grpc.JobsStub, operators_pb2_grpc.OperatorsStub)
        found = (getattr(stub(self._channel), name, None) for stub in stubs)
        return next(method for method in found if method is not None)


def _worth_retrying(error: ColaError) -> bool:
    return error.retryable and error.reason not in ("DEADLINE_EXCEEDED", "TLS_REFUSED")
