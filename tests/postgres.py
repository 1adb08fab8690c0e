"""A PostgreSQL server of its own for the tests, run as another user where we are root: it refuses to be root.

Nothing on disk is synced: what these servers lose, they lose to kills of processes, never of the machine.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cola_runtime.jobs.database import Database

PROGRAMS = ("initdb", "pg_ctl", "postgres")
START_SECONDS = 60
TEMPLATE = "migrated"
SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "16MB",
    "max_connections": "40",
    "listen_addresses": "127.0.0.1",
    "autovacuum": "off",
}


def programs() -> Path | None:
    """The folder of the newest server on this machine."""
    folders = [Path(found).resolve().parent for name in PROGRAMS if (found := shutil.which(name))]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda each: float(each.parts[-2]))
    whole = [folder for folder in folders if all((folder / name).exists() for name in PROGRAMS)]
    return whole[-1] if whole else None


@dataclass(slots=True)
class PostgresServer:
    """Listens on loopback. `stop` and `start` keep what is committed."""

    programs: Path
    folder: Path
    port: int = 0
    _numbers: Any = field(default_factory=itertools.count)

    def create(self) -> None:
        if os.geteuid() == 0:
            owner = _unprivileged()
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
        self._run("initdb", "--no-sync", "--auth=trust", "--username=cola", "--encoding=UTF8", "--locale=C")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        options = " ".join(f"-c {name}={value}" for name, value in SETTINGS.items())
        options += f" -c port={self.port} -c unix_socket_directories={self.folder}"
        log = self.folder / "log"
        self._run("pg_ctl", "start", "-w", "-t", str(START_SECONDS), "-l", str(log), "-o", options)

    def stop(self, mode: str = "immediate") -> None:
        """`immediate` is a crash: the next start recovers."""
        self._run("pg_ctl", "stop", "-w", "-t", str(START_SECONDS), "-m", mode)

    def url(self, database: str) -> str:
        return f"postgresql://cola@127.0.0.1:{self.port}/{database}"

    def new_database(self, *, template: str = "template0") -> str:
        """The URL of a database of its own."""
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)

    def drop(self, url: str) -> None:
        self.execute(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def execute(self, statement: str, *, database: str = "postgres") -> list[Any]:
        with psycopg.connect(self.url(database), autocommit=True) as session:
            cursor = session.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def end_sessions(self, url: str) -> int:
        """Terminate the backends of a database; returns how many there were."""
        name = url.rpartition("/")[2]
        return len(
            self.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        )

    def _run(self, program: str, *arguments: str) -> None:
        owner = _unprivileged() if os.geteuid() == 0 else None
        user = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []} if owner else {}
        data = ["-D", str(self.folder / "data")]
        with tempfile.TemporaryFile() as output:  # a pipe would stay open in the server
            ran = subprocess.run(
                [str(self.programs / program), *arguments, *data],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                timeout=2 * START_SECONDS,
                **user,
            )
            output.seek(0)
            assert ran.returncode == 0, output.read().decode()


def _unprivileged() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    pytest.fail("there is no user `postgres` or `nobody` to run PostgreSQL as")


@contextlib.contextmanager
def postgres_server(folder: Path) -> Iterator[PostgresServer]:
    """A server for as long as the context lasts, with its migrated database `TEMPLATE`."""
    server = PostgresServer(folder, Path(tempfile.mkdtemp(prefix="cola-postgres-")))
    try:
        server.create()
        yield server
    finally:
        with contextlib.suppress(AssertionError):
            server.stop()
        shutil.rmtree(server.folder, ignore_errors=True)


async def make_template(server: PostgresServer) -> None:
    """The database that most tests begin with: a copy of it is made faster than migrated."""
    server.execute(f"CREATE DATABASE {TEMPLATE} TEMPLATE template0")
    database = Database(server.url(TEMPLATE))
    await database.open()
    await database.close()
