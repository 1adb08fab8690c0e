"""The one thread that computes on the base model. What is urgent (an install) goes before steps that wait."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from cola_runtime.machine import yield_to_streams

T = TypeVar("T")


class ComputeLane:
    """Runs one piece of work at a time; within one urgency in the order of calls."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "base-model", yield_to_streams)
        self._lock = threading.Lock()
        self._order = itertools.count()
        self._waiting: list[tuple[bool, int, Callable[[], Any], Future[Any]]] = []

    async def run(self, work: Callable[[], T], *, urgent: bool = False) -> T:
        """The work's result, or what it raised. A cancelled caller's work is dropped if it has not begun."""
        return await asyncio.wrap_future(self.submit(work, urgent=urgent))

    def submit(self, work: Callable[[], T], *, urgent: bool = False) -> Future[T]:
        """`run` that does not wait: the work has its place when this returns."""
        future: Future[T] = Future()
        with self._lock:
            heapq.heappush(self._waiting, (not urgent, next(self._order), work, future))
        self._thread.submit(self._run_first)
        return future

    def stop(self) -> None:
        """Drop what waits; what runs ends by itself."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for _, _, _, future in waiting:
            future.cancel()
        self._thread.shutdown(wait=False)

    def _run_first(self) -> None:
        with self._lock:
            if not self._waiting:
                return
            _, _, work, future = heapq.heappop(self._waiting)
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = work()
        except BaseException as error:  # the caller's to judge: it is raised where the result is awaited
            future.set_exception(error)
        else:
            future.set_result(result)
