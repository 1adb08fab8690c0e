"""Whether the job store's SQLite file is whole. Looking changes no byte of it, nor of its -wal.

SQLite keeps no checksums of its pages: what is found is a file, a page or a tree that cannot be one, not a
number within a row that was another once.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from cola_runtime.errors import Unavailable

_CODES = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


def is_damage(error: BaseException | None) -> bool:
    """The driver says that the file is no whole database, whatever it was asked for."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF in _CODES


def damage_of(path: Path) -> str:
    """What is wrong with the file; "" if nothing is, or there is none. Reads all of it.

    Raises sqlite3.Error where it cannot be read: `locked` while a coordinator has it open.
    """
    if not path.exists():
        return ""
    wal = path.with_name(f"{path.name}-wal")
    if path.stat().st_size == 0 and wal.exists() and wal.stat().st_size > 0:
        return "the file is empty, and its -wal is not"  # which SQLite would delete as another database's
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=0)
        ) as file:
            found = str(file.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.DatabaseError as error:
        if is_damage(error):
            return str(error)
        raise
    return "" if found == "ok" else found.splitlines()[-1]


def check_whole(path: Path) -> None:
    """Raises Unavailable `STORE_CORRUPT`. A file that cannot be looked at is for who opens it to refuse."""
    with contextlib.suppress(sqlite3.OperationalError):
        if found := damage_of(path):
            raise corrupt(path, found)


def corrupt(path: Path, found: str) -> Unavailable:
    return Unavailable(
        "STORE_CORRUPT",
        f"the job store's file is damaged: {found[:200]}",
        where=str(path),
        remedy="Nothing more is written to it: stop the service, move it and its -wal away, put back a copy "
        "(docs/deploy.md, Copies).",
    )
