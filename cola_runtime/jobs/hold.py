"""A coordinator's hold of a job store on PostgreSQL: one of them writes, and every commit has one outcome.

The session that writes holds an advisory lock, so a second coordinator finds it taken. A session that is lost
has lost its lock; the next one takes it again before it does anything else, and then looks at the row
`coordinator`:

* Its term is another's: somebody has taken the store over meanwhile. This coordinator writes no more.
* Its last write is that of a commit whose answer was lost with the session: that commit was made. The old
  session has ended, or its lock could not have been taken, so the row tells for good.

Every transaction that writes sets the row, and only in its own term.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, select
from sqlalchemy.pool import QueuePool

from cola_runtime.errors import InvalidInput, Unavailable
from cola_runtime.jobs import schema

LOCK_KEY = 0x636F6C61  # "cola"; advisory locks are of one database
CONNECT_SECONDS = 3
STATEMENT_SECONDS = 30
LINK_SECONDS = 15  # silence of the other side after which either gives the session up

_coordinator = schema.coordinator


@dataclass(slots=True)
class Doubt:
    """A commit whose answer was lost with its session."""

    number: int
    committed: Callable[[], None]  # to be called if it was made
    made: bool | None = None  # not known before the store is held again


class CommitInDoubt(Exception):
    """The session was lost while it committed."""

    def __init__(self, doubt: Doubt, result: Any) -> None:
        super().__init__("the session was lost while it committed")
        self.doubt, self.result = doubt, result


class Hold:
    """Belongs to the database's thread, as its one connection does."""

    def __init__(self, url: URL, *, patience_milliseconds: Callable[[], int]) -> None:
        self.engine = server_engine(
            url,
            name=f"cola coordinator {socket.gethostname()[:30]} {os.getpid()}",
            # One session, so that transactions follow one another and the lock covers each of them.
            poolclass=QueuePool,
            pool_size=1,
            max_overflow=0,
        )
        self._patience = patience_milliseconds
        self.term: int | None = None  # of this coordinator; None before `begin` is committed
        self._writes = 0
        self._doubt: Doubt | None = None
        event.listen(self.engine, "connect", self._enter)

    def begin(self, connection: Connection) -> int:
        """A term of its own: whoever held the store before writes no more."""
        row = _coordinator.update().values(term=_coordinator.c.term + 1, last_write=0)
        return int(connection.execute(row.returning(_coordinator.c.term)).scalar_one())

    def mark(self, connection: Connection) -> int | None:
        """The number of a transaction that writes; None before there is a term."""
        if self.term is None:
            return None
        row = _coordinator.update().where(_coordinator.c.term == self.term)
        if connection.execute(row.values(last_write=self._writes + 1)).rowcount != 1:
            raise taken_over()
        self._writes += 1
        return self._writes

    def doubt(self, number: int, committed: Callable[[], None]) -> Doubt:
        """Of the transaction `number`, whose commit brought no answer."""
        self._doubt = Doubt(number, committed)
        return self._doubt

    def _enter(self, session: Any, _record: object) -> None:
        try:
            session.autocommit = True
            self._take_lock(session)
            session.autocommit = False
        except BaseException:
            session.close()
            raise

    def _take_lock(self, session: Any) -> None:
        held = _try_lock(session, self._patience())
        if self.term is not None:  # not before the tables are there
            term, last_write = session.execute("SELECT term, last_write FROM coordinator").fetchone()
            if term != self.term:
                raise taken_over()
        if not held:
            raise store_busy(self._patience())
        if self._doubt is not None:
            self._doubt.made = last_write == self._doubt.number
            if self._doubt.made:
                self._doubt.committed()
            self._doubt = None


def store_id(connection: Connection) -> str:
    """Which job store this is, whatever its address."""
    return str(connection.execute(select(_coordinator.c.store_id)).scalar_one())


def store_busy(milliseconds: int) -> Unavailable:
    return Unavailable(
        "STORE_BUSY",
        "another process has the job store open",
        limit=f"{milliseconds} ms",
        remedy="Stop the other coordinator, or ask it through its API.",
    )


def taken_over() -> Unavailable:
    return Unavailable(
        "STORE_TAKEN_OVER", "another coordinator has taken the job store while this one was cut off from it"
    )


def server_engine(url: URL, *, name: str, **pool: Any) -> Engine:
    """Its sessions are shown under `name` by the server. Raises InvalidInput `DATABASE_DRIVER_MISSING`."""
    try:
        return create_engine(
            url.set(drivername="postgresql+psycopg"),
            hide_parameters=True,
            isolation_level="READ COMMITTED",  # enough for the only one who writes
            connect_args=_session_options(name),
            **pool,
        )
    except ImportError as error:
        raise InvalidInput(
            "DATABASE_DRIVER_MISSING",
            "a job store on PostgreSQL needs psycopg",
            where="database",
            remedy="pip install 'cola_runtime[postgres]'",
        ) from error


def _session_options(name: str) -> dict[str, Any]:
    """Of every session: durable commits, and neither side waits for the other forever."""
    server = {
        "synchronous_commit": "on",
        "statement_timeout": f"{STATEMENT_SECONDS}s",
        "idle_in_transaction_session_timeout": f"{2 * STATEMENT_SECONDS}s",
        "tcp_keepalives_idle": LINK_SECONDS // 3,
        "tcp_keepalives_interval": LINK_SECONDS // 3,
        "tcp_keepalives_count": 2,
    }
    return {
        "application_name": name,
        "connect_timeout": CONNECT_SECONDS,
        "tcp_user_timeout": 1000 * LINK_SECONDS,
        "keepalives_idle": LINK_SECONDS // 3,
        "keepalives_interval": LINK_SECONDS // 3,
        "keepalives_count": 2,
        "options": " ".join(f"-c {setting}={value}" for setting, value in server.items()),
    }


def _try_lock(session: Any, milliseconds: int) -> bool:
    """A session that has ended may hold its lock for a moment still."""
    from psycopg.errors import LockNotAvailable

    session.execute(f"SET lock_timeout = {milliseconds}")
    try:
        session.execute("SELECT pg_advisory_lock(%s)", (LOCK_KEY,))
    except LockNotAvailable:
        return False
    return True
