"""A bounded, numbered log of events with a long poll, for one reader that remembers how far it has read.

What the reader has read is forgotten: a base model that runs for weeks holds the events of a moment.
"""

from __future__ import annotations

import asyncio
from collections import deque

from cola_runtime.errors import Conflict
from cola_runtime.types import BaseEvent

CAPACITY = 65_536
POLL_SECONDS = 5.0


class EventLog:
    """Numbers count from 1. Belongs to one event loop."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._events: deque[BaseEvent] = deque(maxlen=capacity)
        self._last = 0
        self._changed = asyncio.Event()

    def append(self, event: BaseEvent) -> None:
        self._events.append(event)
        self._last += 1
        self._changed.set()

    async def after(
        self, number: int, *, timeout_seconds: float = POLL_SECONDS
    ) -> tuple[int, list[BaseEvent]]:
        """The last number and the events above `number`; none if nothing came in time.

        A reader that begins, again or for the first time, says 0 and gets what is kept. Raises Conflict
        EVENTS_LOST when some above `number` were dropped, or when this is a younger log.
        """
        first = self._last - len(self._events)
        if number and not first <= number <= self._last:
            raise Conflict(
                "EVENTS_LOST",
                f"events {first + 1} to {self._last} are kept",
                actual=number,
                remedy="Begin at 0.",
            )
        for _ in range(number - first):
            self._events.popleft()
        if not self._events:
            await self._wait(timeout_seconds)
        return self._last, list(self._events)

    async def _wait(self, timeout_seconds: float) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._changed.wait()
        except TimeoutError:
            return
