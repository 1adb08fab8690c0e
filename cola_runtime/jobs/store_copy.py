"""Copies a job store that nobody serves into an empty one, from SQLite to PostgreSQL or back.

One transaction reads all of it while another writes all of it: the target has every table as it was, or is
as it was itself. Both stores are held meanwhile, as a coordinator holds its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any, TypeVar

from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Table, func, make_url, select

from cola_runtime.errors import Conflict, InvalidInput, NotFound, Unavailable
from cola_runtime.jobs import schema
from cola_runtime.jobs.database import Database, migrations, unreachable, upgrade
from cola_runtime.jobs.hold import store_id

STORE_FILE = "jobs.sqlite"
STORE_ID_FILE = "store-id"
ROWS_AT_ONCE = 500
BATCHES_AHEAD = 8
LOOK_AGAIN_SECONDS = 0.1

TABLES = tuple(schema.metadata.sorted_tables)

Result = TypeVar("Result")
_Batch = tuple[Table, list[dict[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePlace:
    """Where a job store is: in a data folder, or in a database."""

    url: str
    shown: str  # without a password
    folder: Path | None = None  # of SQLite

    @classmethod
    def of(cls, named: str) -> StorePlace:
        """A data folder, or `postgresql://...`. Raises InvalidInput `STORE_PLACE_INVALID`."""
        if named.startswith("postgresql://"):
            return cls(url=named, shown=make_url(named).render_as_string(hide_password=True))
        if "://" in named:
            raise InvalidInput(
                "STORE_PLACE_INVALID",
                "a job store is in a data folder, or in postgresql://...",
                remedy="Name the folder that COLA_DATA_DIR names, or the database that COLA_DATABASE names.",
            )
        folder = Path(named)
        return cls(url=f"sqlite:///{(folder / STORE_FILE).resolve()}", shown=str(folder), folder=folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiedTable:
    table: str
    rows: int
    sha256: str  # of its rows, in whichever order


class _Digest:
    """Counts a table's rows and sums up their digests: databases sort texts differently."""

    def __init__(self) -> None:
        self.rows, self._sum = 0, 0

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            digest = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest()
            self._sum = (self._sum + int.from_bytes(digest)) % 2**256
        self.rows += len(rows)

    def of(self, table: str) -> CopiedTable:
        return CopiedTable(table=table, rows=self.rows, sha256=f"{self._sum:064x}")


async def copy_store(source: StorePlace, target: StorePlace) -> list[CopiedTable]:
    """Every table of the stopped service's store, as it is in the target now.

    Raises NotFound `STORE_MISSING`; Unavailable `STORE_BUSY` while a coordinator holds either one; Conflict
    `STORE_NOT_EMPTY`, `STORE_MISMATCH` (tables of another release, or a folder of another store's objects).
    """
    if source.folder is not None and not (source.folder / STORE_FILE).exists():
        raise NotFound("STORE_MISSING", "there is no job store in this folder", where=source.shown)
    if target.folder is not None:
        target.folder.mkdir(parents=True, exist_ok=True)
    reading, writing = Database(source.url), Database(target.url)
    try:
        await reading.run(lambda c: _check_revision(c, source))
        await writing.run(lambda c: _check_empty(c, target))
        _check_objects(await reading.run(store_id), target)
        return await _copy(reading, writing)
    finally:
        await reading.close()
        await writing.close()


async def _copy(reading: Database, writing: Database) -> list[CopiedTable]:
    batches = _Batches()
    read = asyncio.create_task(reading.run(_once(lambda c: _read_all(c, batches))))
    written = asyncio.create_task(writing.run(_once(lambda c: _write_all(c, batches))))
    await asyncio.wait((read, written), return_when=asyncio.FIRST_EXCEPTION)
    batches.stop()
    await asyncio.wait((read, written))
    failures = [task.exception() for task in (read, written)]
    for failure in sorted(filter(None, failures), key=lambda each: isinstance(each, _Alone)):
        raise failure
    return written.result()


class _Alone(Exception):
    """The other side has ended."""


class _Batches:
    """From the thread that reads to the one that writes, a bounded number ahead."""

    def __init__(self) -> None:
        self._queue: Queue[_Batch | dict[str, CopiedTable]] = Queue(BATCHES_AHEAD)
        self._stopped = False

    def put(self, item: _Batch | dict[str, CopiedTable]) -> None:
        while not self._stopped:
            try:
                return self._queue.put(item, timeout=LOOK_AGAIN_SECONDS)
            except Full:
                continue
        raise _Alone

    def __iter__(self) -> Iterator[_Batch | dict[str, CopiedTable]]:
        while True:
            try:
                yield self._queue.get(timeout=LOOK_AGAIN_SECONDS)
            except Empty:
                if self._stopped:
                    return

    def stop(self) -> None:
        """One side has ended: the other one waits no more."""
        self._stopped = True


def _once(work: Callable[[Connection], Result]) -> Callable[[Connection], Result]:
    """A session that was lost begins nothing anew: the other side is in the middle."""
    begun = False

    def attempt(connection: Connection) -> Result:
        nonlocal begun
        if begun:
            raise unreachable()
        begun = True
        return work(connection)

    return attempt


def _read_all(connection: Connection, batches: _Batches) -> None:
    found = {}
    for table in TABLES:
        digest = _Digest()
        for rows in _rows(connection, table):
            digest.add(rows)
            batches.put((table, rows))
        found[table.name] = digest.of(table.name)
    batches.put(found)


def _write_all(connection: Connection, batches: _Batches) -> list[CopiedTable]:
    upgrade(connection)
    connection.execute(schema.coordinator.delete())
    for item in batches:
        if isinstance(item, dict):
            _number_on(connection)
            return _verified(connection, item)
        table, rows = item
        connection.execute(table.insert(), rows)
    raise _Alone


def _verified(connection: Connection, wanted: dict[str, CopiedTable]) -> list[CopiedTable]:
    """What is there now, which is what was read. Raises Unavailable `STORE_FAILED`: nothing is copied."""
    written = []
    for table in TABLES:
        digest = _Digest()
        for rows in _rows(connection, table):
            digest.add(rows)
        written.append(digest.of(table.name))
    for found in written:
        if found != wanted[found.table]:
            raise Unavailable(
                "STORE_FAILED",
                f"table {found.table} came out otherwise than it was; nothing was copied",
                limit=f"{wanted[found.table].rows} rows, {wanted[found.table].sha256[:16]}",
                actual=f"{found.rows} rows, {found.sha256[:16]}",
                remedy="Report this with the two databases' versions.",
            )
    return written


def _rows(connection: Connection, table: Table) -> Iterator[list[dict[str, Any]]]:
    options = {"stream_results": True, "yield_per": ROWS_AT_ONCE}
    for rows in connection.execute(select(table), execution_options=options).mappings().partitions():
        yield [dict(row) for row in rows]


def _number_on(connection: Connection) -> None:
    """New rows get numbers behind those that are there; SQLite does so by itself."""
    if connection.dialect.name != "postgresql":
        return
    for table in (schema.events, schema.audit):
        last = connection.execute(select(func.max(table.c.id))).scalar_one()
        if last is not None:
            sequence = func.pg_get_serial_sequence(table.name, "id")
            connection.execute(select(func.setval(sequence, last)))


def _check_revision(connection: Connection, place: StorePlace) -> None:
    found, newest = _revision(connection), _newest_revision()
    if found != newest:
        raise Conflict(
            "STORE_MISMATCH",
            "the job store's tables are of another release",
            where=place.shown,
            limit=newest,
            actual=found or "no tables",
            remedy="Start this release's `cola serve` with it once, which brings them up, and stop it again.",
        )


def _check_empty(connection: Connection, place: StorePlace) -> None:
    if _revision(connection) is None:
        return
    _check_revision(connection, place)
    counts = defaultdict(int)
    for table in TABLES:
        if table is not schema.coordinator:
            counts[table.name] = connection.execute(select(func.count()).select_from(table)).scalar_one()
    if any(counts.values()):
        told = ", ".join(f"{rows} {name}" for name, rows in counts.items() if rows)
        raise Conflict(
            "STORE_NOT_EMPTY",
            f"the job store to copy to is not empty: {told}",
            where=place.shown,
            remedy="Name an empty database, or a folder without a job store; move an old one aside.",
        )


def _check_objects(copied: str, target: StorePlace) -> None:
    """The folder's datasets and checkpoints, if it has any, are those of the store that is copied."""
    path = None if target.folder is None else target.folder / STORE_ID_FILE
    if path is not None and path.exists() and path.read_text(encoding="ascii").strip() != copied:
        raise Conflict(
            "STORE_MISMATCH",
            "the data folder's datasets and checkpoints belong to another job store",
            where=str(path),
            remedy="Name the data folder of the service whose store this is.",
        )


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _newest_revision() -> str:
    return str(ScriptDirectory.from_config(migrations()).get_current_head())
