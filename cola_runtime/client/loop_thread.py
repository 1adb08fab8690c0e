"""How the synchronous client drives the asynchronous one: a private event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

CLOSE_TIMEOUT_SECONDS = 5.0


class LoopThread:
    """An event loop that runs until it is closed; a daemon thread, so it never keeps a program alive."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cola-client", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """The coroutine's result. An interrupt (Ctrl-C) while waiting cancels the coroutine."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_SECONDS)
        self._loop.close()


def synchronous(
    method: Callable[Concatenate[Any, Parameters], Coroutine[Any, Any, Result]],
) -> Callable[Concatenate[Any, Parameters], Result]:
    """The blocking form of an asynchronous method, with its signature and its docstring."""

    def call(self: Any, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        result: Result = self._loop.run(method(self._twin, *args, **kwargs))
        return result

    functools.update_wrapper(call, method)
    return call


def synchronous_iterator(
    method: Callable[Concatenate[Any, Parameters], AsyncIterator[Result]],
) -> Callable[Concatenate[Any, Parameters], Iterator[Result]]:
    """The blocking form of an asynchronous generator."""

    def call(self: Any, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Iterator[Result]:
        items: Any = method(self._twin, *args, **kwargs)
        steps: set[asyncio.Task[Any] | None] = set()
        try:
            while (item := self._loop.run(_next(items, steps))) is not _END:
                yield item
        finally:
            self._loop.run(_close(items, steps))

    functools.update_wrapper(call, method)
    return call


_END: Any = object()


async def _close(items: Any, steps: set[asyncio.Task[Any] | None]) -> None:
    """Close the generator, once an interrupted step of it has ended.

    An interrupt between handing a step to the loop and waiting for it leaves nobody else to cancel it.
    """
    for step in filter(None, list(steps)):
        step.cancel()
    while items.ag_running:  # noqa: ASYNC110 (a generator tells nobody when it stops)
        await asyncio.sleep(0)
    await items.aclose()


async def _next(items: Any, steps: set[asyncio.Task[Any] | None]) -> Any:
    step = asyncio.current_task()
    steps.add(step)
    try:
        return await anext(items, _END)
    finally:
        steps.discard(step)
