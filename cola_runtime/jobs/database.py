"""One database connection in one thread, behind an async door.

Below SQLite 3.51.3 a second connection that writes can corrupt a WAL database. So there is exactly one, used
from one thread, and SQLite's exclusive locking keeps every other process out for as long as it is open. On
PostgreSQL it is one session, too, and an advisory lock does the same (hold.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.pool import StaticPool

from cola_runtime.errors import ColaError, InvalidInput, Unavailable
from cola_runtime.jobs.damage import check_whole, corrupt, is_damage
from cola_runtime.jobs.hold import CommitInDoubt, Doubt, Hold, store_busy

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_MILLISECONDS = 5_000
REST_SECONDS = 0.5  # after a failed attempt to reach the database
SETTLE_SECONDS = 0.2

OUTAGES = frozenset({
    "STORE_BUSY", "STORE_CORRUPT", "STORE_FAILED", "STORE_UNREACHABLE", "STORAGE_FULL", "STORAGE_FAILED"
})  # fmt: skip
"""Reasons that are no job's fault: the same call may work in a while, or once an operator has acted."""

_NO_SESSION = frozenset({"57P01", "57P02", "57P03", "53300"})  # shut down, crashed, starting, full

WRITES = "writes"  # of a connection: its transaction has changed something

Result = TypeVar("Result")


def _nothing() -> None:
    """What follows a commit that nobody waits for."""


class Database:
    """Runs functions of a connection, each in one transaction: all of its writes are durable, or none."""

    def __init__(self, url: str) -> None:
        self._hold: Hold | None = None
        self._file: Path | None = None
        if url.startswith("sqlite"):
            database = make_url(url).database
            self._file = None if database in (None, "", ":memory:") else Path(database)
            self._engine = _sqlite_engine(url)
        else:
            self._hold = Hold(make_url(url), patience_milliseconds=lambda: BUSY_TIMEOUT_MILLISECONDS)
            self._engine = self._hold.engine
        event.listen(self._engine, "before_execute", _note_write)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="job-store")
        self._closed = False
        self._rests_until = 0.0
        self.outage: Unavailable | None = None
        """Why the last transaction failed, if the database was the cause; a full disk fails writes only."""
        self.taken_over: Future[None] = Future()
        """Done once another coordinator has taken the store: this one can write no more."""

    async def open(self) -> None:
        """Bring the tables to the newest migration, and be the one who writes.

        Raises Unavailable: `STORE_CORRUPT` before anything is written, `STORE_BUSY`.
        """
        if self._file is not None:
            await self._in_thread(check_whole, self._file)
        await self.run(upgrade)
        if self._hold is not None:
            self._hold.term = await self.run(self._hold.begin)

    async def run(
        self, work: Callable[[Connection], Result], *, committed: Callable[[], None] = _nothing
    ) -> Result:
        """Commit what `work` did and return its result; if it raises, nothing of it remains.

        Once begun, a transaction ends even if its caller is cancelled. `committed` is called in the database
        thread, after a commit only. Whoever commits while the database is lost waits until it is back and
        tells what became of that. `work` changes nothing but the database: it may be called twice.
        """
        try:
            return await self._in_thread(self._transact, work, committed)
        except CommitInDoubt as unknown:
            await self._settle(unknown.doubt)
            return unknown.result  # type: ignore[no-any-return]

    async def close(self) -> None:
        """Finish what was begun, then let go of the database. A second time does nothing."""
        if self._closed:
            return
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.dispose)
        self._thread.shutdown(wait=True)

    async def _in_thread(self, call: Callable[..., Result], *arguments: Any) -> Result:
        if self._closed:
            raise Unavailable("STORE_CLOSED", "the job store is closed: the coordinator is stopping")
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    async def _settle(self, doubt: Doubt) -> None:
        """Wait until it is known. Raises Unavailable if nothing was changed."""
        while doubt.made is None:
            await asyncio.sleep(SETTLE_SECONDS)
            try:
                await self._in_thread(self._transact, _look, _nothing)
            except Unavailable as error:
                if error.reason not in OUTAGES:
                    raise
        if not doubt.made:
            raise unreachable()

    def _transact(self, work: Callable[[Connection], Result], committed: Callable[[], None]) -> Result:
        if time.monotonic() < self._rests_until:
            raise unreachable()
        if self.outage is not None and self.outage.reason == "STORE_CORRUPT":
            raise self.outage  # for good: what is written to a damaged file may be lost, and damage more
        try:
            result, wrote = self._attempt(work, committed)
        except DBAPIError as error:
            raise self._noted(self._explained(error)) from error
        except Unavailable as error:  # of a new session that may not write
            self._noted(error)
            raise
        except CommitInDoubt:
            self.outage = unreachable()
            raise
        if wrote or (self.outage is not None and self.outage.reason != "STORAGE_FULL"):
            self.outage = None
        committed()
        return result

    def _attempt(
        self, work: Callable[[Connection], Result], committed: Callable[[], None]
    ) -> tuple[Result, bool]:
        """A session that was lost before its commit has changed nothing: another one is tried at once."""
        try:
            return self._commit(work, committed)
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
        return self._commit(work, committed)

    def _commit(
        self, work: Callable[[Connection], Result], committed: Callable[[], None]
    ) -> tuple[Result, bool]:
        with self._engine.connect() as connection:
            transaction = connection.begin()
            connection.info[WRITES] = False
            result = work(connection)
            wrote = bool(connection.info[WRITES])
            number = self._hold.mark(connection) if self._hold is not None and wrote else None
            try:
                transaction.commit()
            except DBAPIError as error:
                if self._hold is None or number is None or not error.connection_invalidated:
                    raise
                raise CommitInDoubt(self._hold.doubt(number, committed), result) from error
            return result, wrote

    def _explained(self, error: DBAPIError) -> ColaError:
        if self._file is not None and is_damage(error.orig):
            return corrupt(self._file, str(error.orig))
        return store_error(error)

    def _noted(self, error: ColaError) -> ColaError:
        if isinstance(error, Unavailable) and error.reason in OUTAGES:
            self.outage = error
            if error.reason == "STORE_UNREACHABLE":  # those who wait in line must not each wait for it
                self._rests_until = time.monotonic() + REST_SECONDS
        if error.reason == "STORE_TAKEN_OVER" and not self.taken_over.done():
            self.taken_over.set_result(None)
        return error


def _look(connection: Connection) -> None:
    """There is a session again."""


def _note_write(connection: Connection, statement: Any, *_: object) -> None:
    if getattr(statement, "is_dml", False):
        connection.info[WRITES] = True


def _sqlite_engine(url: str) -> Engine:
    engine = create_engine(url, poolclass=StaticPool)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late to cover a read before a write
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MILLISECONDS}")
    cursor.execute("PRAGMA locking_mode = EXCLUSIVE")  # before WAL is entered, or it would share memory
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def upgrade(connection: Connection) -> None:
    """Bring the tables to the newest migration."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SET LOCAL statement_timeout = 0"))
    config = migrations()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def migrations() -> Config:
    """Where Alembic finds them."""
    config = Config()
    config.set_main_option("script_location", "cola_runtime.jobs:migrations")
    config.set_main_option("path_separator", "os")
    return config


def store_error(error: DBAPIError) -> ColaError:
    """What the driver's error means to a caller. SQL and values stay out of the message."""
    logger.warning(
        "job store: %s: %s", type(error.orig).__name__, _first_line(error), extra={"event": "store.failed"}
    )
    if isinstance(error, IntegrityError):  # something that must never be false would be: our fault
        return Unavailable(
            "STORE_REFUSED", "the job store refused the change", remedy="See the service's log."
        )
    if isinstance(error, DataError):
        return InvalidInput(
            "VALUE_NOT_STORABLE",
            "a text or a number is none that the job store can hold; nothing was changed",
        )
    state, cause = getattr(error.orig, "sqlstate", None), str(error.orig)
    of_server = hasattr(error.orig, "sqlstate")
    if state == "53100" or (not of_server and "full" in cause):
        return Unavailable(
            "STORAGE_FULL",
            "the job store's disk is full; nothing was changed",
            remedy="Free space, try again.",
        )
    if state == "55P03" or (not of_server and "locked" in cause):
        return store_busy(BUSY_TIMEOUT_MILLISECONDS)
    if error.connection_invalidated or (of_server and (state is None or state in _NO_SESSION)):
        return unreachable()
    return Unavailable(
        "STORE_FAILED", f"the job store failed ({type(error.orig).__name__})", remedy="See the service's log."
    )


def unreachable() -> Unavailable:
    """Nothing is known of the database but that it does not answer."""
    return Unavailable("STORE_UNREACHABLE", "the job store's database cannot be reached; nothing was changed")


def _first_line(error: DBAPIError) -> str:
    """The lines behind it hold values of rows."""
    return (str(error.orig).splitlines() or [""])[0][:300]
