"""How whatever is written of a job becomes durable, known to `Memory` and told to who watches the job."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection

from cola_runtime import crash_points
from cola_runtime.jobs.database import Database
from cola_runtime.jobs.recall import Memory
from cola_runtime.jobs.records import JobRecord

Result = TypeVar("Result")


class JobWrites:
    """Belongs to the event loop. Writes happen in the database's thread, in the order they were asked for."""

    def __init__(self, database: Database, memory: Memory, *, at: Callable[[], str]) -> None:
        self.database, self._memory = database, memory
        self.at = at  # now, as records have it
        self._loop = asyncio.get_running_loop()
        self._wakes: dict[str, asyncio.Event] = {}  # one per watched job, set and dropped at its next commit

    async def run(self, what: str, job_id: str, work: Callable[[Connection], Result]) -> Result:
        """`work`'s result, once it is committed. `what` names the crash points before and after that."""

        def write(connection: Connection) -> Result:
            result = work(connection)
            crash_points.reach(f"store.{what}.uncommitted")
            return result

        def committed() -> None:
            crash_points.reach(f"store.{what}.committed")
            self._wake_soon(job_id)

        result = await self.database.run(write, committed=committed)
        if isinstance(result, JobRecord):
            self._memory.note_jobs([result])
        return result

    def next_commit(self, job_id: str) -> asyncio.Event:
        """Is set at the next commit that concerns the job."""
        return self._wakes.setdefault(job_id, asyncio.Event())

    def _wake_soon(self, job_id: str) -> None:
        """Called in the database's thread, so that a commit wakes watchers even if its caller is gone."""
        self._loop.call_soon_threadsafe(self._wake, job_id)

    def _wake(self, job_id: str) -> None:
        wake = self._wakes.pop(job_id, None)
        if wake is not None:
            wake.set()
