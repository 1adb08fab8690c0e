"""How many calls one host may have under way at a port, so that it leaves room for the others.

gRPC caps connections of all peers together, and calls of one connection, and nothing by host. Here each call
is counted under its peer's address from the moment that it reaches its handler (a call with one request: when
that has arrived). Calls of which nobody knows yet whose they are have a lower cap of their own.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio

from cola_runtime.config import HostSettings
from cola_runtime.errors import QuotaExceeded
from cola_runtime.transport.status import abort_with

_BEHAVIOURS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class _Call:
    def __init__(self, on_known: Callable[[], None]) -> None:
        self._on_known: Callable[[], None] | None = on_known

    def known(self) -> None:
        """A second time does nothing."""
        on_known, self._on_known = self._on_known, None
        if on_known is not None:
            on_known()


_current: ContextVar[_Call | None] = ContextVar("call", default=None)


def caller_known() -> None:
    """Whose the present call is has been looked at: it counts as a stranger's no more."""
    call = _current.get()
    if call is not None:
        call.known()


class HostCalls(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Of one server, or of several together. Belongs to the event loop."""

    def __init__(self, limits: HostSettings) -> None:
        """In IPv6 a host is a network of /64."""
        self._limits = limits
        self._uncapped = frozenset(map(str, limits.proxies))
        self._calls: Counter[str] = Counter()
        self._unknown: Counter[str] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """As grpc asks it for each call; None is a method that nobody serves."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return handler
        counted = {
            name: self._counted(behaviour) for name in _BEHAVIOURS if (behaviour := getattr(handler, name))
        }
        return handler._replace(**counted)

    @contextmanager
    def entered(self, peer: str) -> Iterator[_Call]:
        """For as long as the call lasts. Raises QuotaExceeded `TOO_MANY_CALLS`."""
        host = host_of(peer)
        if host not in self._uncapped:
            _check(host, self._calls[host], self._limits.calls, "calls")
            _check(
                host,
                self._unknown[host],
                self._limits.unknown_calls,
                "calls that have not said whose they are",
            )
        call = _Call(lambda: _leave(self._unknown, host))
        self._calls[host] += 1
        self._unknown[host] += 1
        try:
            yield call
        finally:
            call.known()
            _leave(self._calls, host)

    def _counted(
        self, behaviour: Callable[[Any, Any], Awaitable[Any]]
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def serve(request: Any, context: Any) -> Any:
            try:
                with self.entered(context.peer()) as call:
                    token = _current.set(call)
                    try:
                        return await behaviour(request, context)
                    finally:
                        _current.reset(token)
            except QuotaExceeded as error:  # of this host's; a behaviour ends its call by itself
                await abort_with(context, error)

        return serve


def host_of(peer: str) -> str:
    """Of `ipv4:192.0.2.1:5000` or `ipv6:%5B2001:db8::1%5D:5000` the address, or the network of /64."""
    text = unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return peer  # of a socket without address
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


def _check(host: str, actual: int, limit: int, what: str) -> None:
    if actual >= limit:
        raise QuotaExceeded(
            "TOO_MANY_CALLS",
            f"host {host} has as many {what} under way as one host may have",
            limit=limit,
            actual=actual,
            remedy="End some of them, or wait for their end, and try again.",
        )


def _leave(counter: Counter[str], host: str) -> None:
    """A host without calls leaves nothing behind."""
    counter[host] -= 1
    if not counter[host]:
        del counter[host]
