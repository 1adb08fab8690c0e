"""Following one job's events: the database is asked once for each commit that may have brought some."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection

from cola_runtime.jobs import job_rows, trail
from cola_runtime.jobs.database import Database
from cola_runtime.jobs.records import EventRecord


@dataclass(frozen=True, slots=True)
class News:
    """What a watcher was told."""

    events: list[EventRecord]
    ended: bool  # the job has, and its end is among the events told so far, unless more are to be read


class JobWatch:
    """One reader's place in a job's history. Belongs to the event loop."""

    def __init__(
        self,
        job_id: str,
        database: Database,
        next_commit: Callable[[str], asyncio.Event],
        *,
        after: int,
        page: int,
    ) -> None:
        """`next_commit`: what is set at the next commit that concerns a job. `page`: most events at once."""
        self._job_id, self._database, self._next_commit = job_id, database, next_commit
        self._after, self._page = after, page
        self._commit: asyncio.Event | None = None  # unless it is set, all that is there has been read
        self._ended = False

    async def news(self, *, timeout_seconds: float) -> News:
        """The next events, in order, once there are any; none at the job's end and after a silence."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            events = await self._unread()
            if events or self._ended or not await self._committed(deadline - time.monotonic()):
                return News(events, self._ended)

    async def _unread(self) -> list[EventRecord]:
        if self._commit is not None and not self._commit.is_set():
            return []
        commit = self._next_commit(self._job_id)  # before looking, or one could slip by
        events, self._ended = await self._database.run(self._look)
        if events:
            self._after = events[-1].id
        if len(events) < self._page:  # else, and had looking failed, it looks again at once
            self._commit = commit
        return events

    def _look(self, connection: Connection) -> tuple[list[EventRecord], bool]:
        events = trail.read_events(connection, self._job_id, after=self._after, limit=self._page)
        return events, job_rows.has_ended(connection, self._job_id)

    async def _committed(self, timeout_seconds: float) -> bool:
        if self._commit is None:
            return True
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._commit.wait()
        except TimeoutError:
            self._commit = None  # a silence ends with a look, whatever was committed unnoticed
            return False
        return True
