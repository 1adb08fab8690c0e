"""Ctrl-C while the synchronous client waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from cola_runtime.client.loop_thread import LoopThread, synchronous_iterator


class _Endless:
    """The asynchronous twin: one item, then nothing for good."""

    def __init__(self) -> None:
        self.closed = False

    async def items(self) -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            self.closed = True


class _Blocking:
    def __init__(self) -> None:
        self._loop, self._twin = LoopThread(), _Endless()

    items = synchronous_iterator(_Endless.items)


@pytest.fixture
def blocking() -> Iterator[_Blocking]:
    made = _Blocking()
    yield made
    made._loop.close()


@pytest.mark.timeout(20)
def test_an_interrupt_before_the_wait_for_an_item_has_begun_ends_the_iteration(
    blocking: _Blocking, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = blocking.items()
    assert next(items) == 1
    begin, interrupts = asyncio.run_coroutine_threadsafe, iter([KeyboardInterrupt])

    def interrupted(*arguments: Any) -> Future[Any]:
        future = begin(*arguments)
        for interrupt in interrupts:
            raise interrupt
        return future

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(items)
    assert blocking._twin.closed
