"""The audit trail: who did what to whom, for operators. Entries are only ever added."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict, deque
from dataclasses import dataclass, replace

from sqlalchemy import Connection, select

from cola_runtime import clock
from cola_runtime.errors import ColaError
from cola_runtime.jobs import schema
from cola_runtime.jobs.database import Database

MAX_LISTED = 1000
MAX_TEXT = 500
BURST = 10  # entries of one kind and actor in a window; more are counted, not written
WINDOW_SECONDS = 60.0
FLUSH_SECONDS = 5.0  # that a store which closes gives the entries under way
MAX_ACTORS = 10_000  # kept in memory; beyond, all strangers share one bound

OPERATOR = "operator"
"""Whoever works at the data folder itself, without a key."""

_audit = schema.audit

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One thing that was done, or refused."""

    kind: str  # stable key, as "key.created"
    actor: str  # a key's id, a device's id, an address, or OPERATOR
    tenant: str = ""  # whose it is, by name
    subject: str = ""  # the id of what it was done to
    message: str = ""
    id: int = 0  # the trail gives it
    created_at: str = ""  # the trail stamps it


class AuditTrail:
    """Writes and reads the trail. An entry that cannot be written is an error in the log, no failed call.

    An entry that was asked for is written even if who asked is cancelled; `flush` waits for all of them.
    """

    def __init__(self, database: Database, now: clock.Clock) -> None:
        self._database, self._now = database, now
        self._bound = _Bound()
        self._writing: set[asyncio.Task[None]] = set()

    async def write(self, entry: AuditEntry) -> None:
        """Durable when this returns. Raises Unavailable when it cannot be."""
        at = clock.rfc3339(self._now())
        await self._database.run(lambda c: _insert(c, entry, at=at))

    async def add(self, entry: AuditEntry) -> None:
        """Durable when this returns, or in the log."""
        await asyncio.shield(self._begin(entry))

    async def add_bounded(self, entry: AuditEntry) -> None:
        """As `add`, for what strangers can cause: a few a minute of each kind and actor, then a count."""
        admitted = self._bound.admit(entry)
        if admitted is not None:
            await self.add(admitted)

    def note_bounded(self, entry: AuditEntry) -> None:
        """As `add_bounded`, for who cannot wait: it is written beside whatever else goes on."""
        admitted = self._bound.admit(entry)
        if admitted is not None:
            self._begin(admitted)

    async def flush(self) -> None:
        """Return when nothing is under way, or after FLUSH_SECONDS: then the log tells how many were."""
        if not self._writing:
            return
        _, late = await asyncio.wait(self._writing, timeout=FLUSH_SECONDS)
        if late:
            text = "%d audit entries not written within %g s"
            logger.error(text, len(late), FLUSH_SECONDS, extra={"event": "audit.lost"})

    def _begin(self, entry: AuditEntry) -> asyncio.Task[None]:
        task = asyncio.create_task(self._write_or_log(entry))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        return task

    async def _write_or_log(self, entry: AuditEntry) -> None:
        try:
            await self.write(entry)
        except ColaError:
            logger.exception("audit entry lost: %s", entry, extra={"event": "audit.lost"})

    async def entries(self, *, after: int = 0, limit: int = 100) -> list[AuditEntry]:
        """Oldest first: those above id `after`, or with 0 the newest ones."""
        return await self._database.run(lambda c: _read(c, after=after, limit=max(1, min(limit, MAX_LISTED))))


class _Bound:
    """How much of what strangers do is written down."""

    def __init__(self) -> None:
        self._times: dict[tuple[str, str], deque[float]] = defaultdict(deque)
        self._left_out: dict[tuple[str, str], int] = defaultdict(int)

    def admit(self, entry: AuditEntry) -> AuditEntry | None:
        """The entry, with how many were left out before it; None to leave it out."""
        key = entry.kind, entry.actor
        if key not in self._times and len(self._times) >= MAX_ACTORS:
            self._forget_old()
            key = key if len(self._times) < MAX_ACTORS else (entry.kind, "")
        now, times = time.monotonic(), self._times[key]
        while times and times[0] < now - WINDOW_SECONDS:
            times.popleft()
        if len(times) >= BURST:
            self._left_out[key] += 1
            return None
        times.append(now)
        left_out = self._left_out.pop(key, 0)
        return replace(entry, message=f"{entry.message} (and {left_out} more since)") if left_out else entry

    def _forget_old(self) -> None:
        oldest = time.monotonic() - WINDOW_SECONDS
        for key in [key for key, times in self._times.items() if not times or times[-1] < oldest]:
            del self._times[key]


def _insert(connection: Connection, entry: AuditEntry, *, at: str) -> None:
    connection.execute(
        _audit.insert().values(
            created_at=at,
            kind=entry.kind,
            actor=entry.actor[:MAX_TEXT],
            tenant=entry.tenant,
            subject=entry.subject[:MAX_TEXT],
            message=entry.message[:MAX_TEXT],
        )
    )


def _read(connection: Connection, *, after: int, limit: int) -> list[AuditEntry]:
    query = select(_audit).limit(limit)
    if after:
        rows = list(
            connection.execute(
                query.where(_audit.c.id > min(after, schema.MOST_ID)).order_by(_audit.c.id)
            ).mappings()
        )
    else:
        rows = list(connection.execute(query.order_by(_audit.c.id.desc())).mappings())[::-1]
    return [AuditEntry(**row) for row in rows]
