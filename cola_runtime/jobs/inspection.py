"""What can be told of a job store on PostgreSQL from outside, while a coordinator holds it."""

from __future__ import annotations

from dataclasses import dataclass

from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from cola_runtime.jobs.database import migrations, store_error
from cola_runtime.jobs.hold import LOCK_KEY, server_engine

_HOLDER = text(
    "SELECT application_name, host(client_addr) FROM pg_stat_activity WHERE pid IN (SELECT pid FROM pg_locks"
    " WHERE locktype = 'advisory' AND granted AND classid = 0 AND objid = :key AND database ="
    " (SELECT oid FROM pg_database WHERE datname = current_database()))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreState:
    """A job store as its server shows it."""

    revision: str | None  # of its tables; None before a coordinator has made them
    newest_revision: str  # that this release knows
    known: bool  # this release knows the tables' revision
    holder: str  # who writes: "cola coordinator HOST PID at ADDRESS"; empty: nobody


def inspect_store(url: str) -> StoreState:
    """Reads only, and waits for no lock. Raises Unavailable, InvalidInput `DATABASE_DRIVER_MISSING`."""
    engine = server_engine(make_url(url), name="cola doctor", poolclass=NullPool)
    scripts = ScriptDirectory.from_config(migrations())
    revisions = {script.revision for script in scripts.walk_revisions()}
    try:
        with engine.connect() as connection:
            revision = MigrationContext.configure(connection).get_current_revision()
            found = connection.execute(_HOLDER, {"key": LOCK_KEY}).one_or_none()
    except DBAPIError as error:
        raise store_error(error) from error
    holder = "" if found is None else f"{found[0]} at {found[1] or 'this machine'}"
    newest = str(scripts.get_current_head())
    known = revision is None or revision in revisions
    return StoreState(revision=revision, newest_revision=newest, known=known, holder=holder)
