"""Waits out a job store or an object storage that cannot work just now: locked, full, or out of reach."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from cola_runtime.errors import ColaError, Unavailable
from cola_runtime.jobs.database import OUTAGES

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.2
LAST_PAUSE_SECONDS = 5.0

Result = TypeVar("Result")


def is_outage(error: ColaError) -> bool:
    """Nothing is wrong with the job: the same call may work in a while."""
    return isinstance(error, Unavailable) and error.reason in OUTAGES


async def until_available(call: Callable[[], Awaitable[Result]]) -> Result:
    """The result of `call`, made again after growing pauses for as long as the outage lasts.

    The call must change nothing when made twice. What is no outage is raised: also STORE_CLOSED, since a
    coordinator that stops writes nothing more.
    """
    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            return await call()
        except Unavailable as error:
            if not is_outage(error):
                raise
            logger.warning("%s; trying again in %g s", error, pause, extra={"event": "store.outage"})
        await asyncio.sleep(pause)
        pause = min(2 * pause, LAST_PAUSE_SECONDS)
