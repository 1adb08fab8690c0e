"""One database connection in one thread, behind an async door.

Below SQLite 3.51.3 a second connection that writes can corrupt a WAL database. So there is exactly one, used
from one thread, and SQLite's exclusive locking keeps every other process out for as long as it is open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.pool import StaticPool

from cola_runtime.errors import Unavailable

BUSY_TIMEOUT_MILLISECONDS = 5_000

Result = TypeVar("Result")


def _nothing() -> None:
    """What follows a commit that nobody waits for."""


class Database:
    """Runs functions of a connection, each in one transaction: all of its writes are durable, or none."""

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="job-store")
        self._closed = False

    async def open(self) -> None:
        """Bring the tables to the newest migration."""
        await self.run(_upgrade)

    async def run(
        self, work: Callable[[Connection], Result], *, committed: Callable[[], None] = _nothing
    ) -> Result:
        """Commit what `work` did and return its result; if it raises, nothing of it remains.

        Once begun, a transaction ends even if its caller is cancelled. `committed` is called in the database
        thread, after a commit only.
        """
        if self._closed:
            raise Unavailable("STORE_CLOSED", "the job store is closed: the coordinator is stopping")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work, committed)

    async def close(self) -> None:
        """Finish what was begun, then let go of the database file. A second time does nothing."""
        if self._closed:
            return
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.dispose)
        self._thread.shutdown(wait=True)

    def _transact(self, work: Callable[[Connection], Result], committed: Callable[[], None]) -> Result:
        try:
            with self._engine.begin() as connection:
                result = work(connection)
        except DBAPIError as error:
            raise _unavailable(error) from error
        committed()
        return result


def _engine(url: str) -> Engine:
    engine = create_engine(url, poolclass=StaticPool) if url.startswith("sqlite") else create_engine(url)
    if engine.dialect.name == "sqlite":
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


def _upgrade(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", "cola_runtime.jobs:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _unavailable(error: DBAPIError) -> Unavailable:
    """What the driver's error means to a caller. SQL and values stay out of the message."""
    if isinstance(error, IntegrityError):  # something that must never be false would be: our fault
        return Unavailable(
            "STORE_REFUSED", "the job store refused the change", remedy="See the service's log."
        )
    cause = str(error.orig)
    if "full" in cause:
        return Unavailable(
            "STORAGE_FULL",
            "the job store's disk is full; nothing was changed",
            remedy="Free space, try again.",
        )
    if "locked" in cause:
        return Unavailable(
            "STORE_BUSY",
            "another process has the job store open",
            limit=f"{BUSY_TIMEOUT_MILLISECONDS} ms",
            remedy="Stop the other coordinator, or ask it through its API.",
        )
    return Unavailable(
        "STORE_FAILED", f"the job store failed ({type(error.orig).__name__})", remedy="See the service's log."
    )
