"""How the parts of one stream's life end together."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

CANCEL_AGAIN_SECONDS = 1.0


async def cancel_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Return when every task has ended. One that loses a cancellation on its way is cancelled again."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_SECONDS)


async def until_first_ends(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run all of them; when the first ends, cancel and await the others, then raise what it raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancel_all(tasks)
    for task in done:
        task.result()
