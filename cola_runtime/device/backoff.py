"""Pauses between a device's attempts to dial."""

from __future__ import annotations

import asyncio
import random

from cola_runtime.device.config import DeviceConfig


class Backoff:
    """Pauses between attempts: they double up to a limit, and start over after a success."""

    def __init__(self, config: DeviceConfig) -> None:
        self._first, self._last = config.first_retry_seconds, config.last_retry_seconds
        self._next = self._first

    def reset(self) -> None:
        self._next = self._first

    async def wait(self) -> None:
        seconds, self._next = self._next, min(2 * self._next, self._last)
        await asyncio.sleep(seconds * random.uniform(0.5, 1.0))  # noqa: S311 - spreads devices, guards nothing
