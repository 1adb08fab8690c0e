from __future__ import annotations

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from job_samples import new_job
from sqlalchemy import Connection, inspect

from cola_runtime.jobs import schema
from cola_runtime.jobs.database import Database
from cola_runtime.jobs.store import JobStore


def _checks(connection: Connection) -> dict[str, set[str]]:
    found = inspect(connection)
    return {
        name: {str(check["name"]) for check in found.get_check_constraints(name)}
        for name in schema.metadata.tables
    }


async def test_migrations_build_exactly_the_declared_schema(url: str) -> None:
    migrated, declared = Database(url), Database("sqlite://")
    await migrated.open()
    await declared.run(schema.metadata.create_all)
    differences = await migrated.run(
        lambda c: compare_metadata(MigrationContext.configure(c), schema.metadata)
    )
    assert differences == []
    assert await migrated.run(_checks) == await declared.run(_checks)
    await migrated.close()
    await declared.close()


async def test_opening_again_keeps_what_is_there(url: str) -> None:
    store = await JobStore.open(url)
    job = await store.create_job(new_job(await store.create_tenant("acme")))
    await store.close()
    store = await JobStore.open(url)
    assert await store.job(job.job_id) == job
    await store.close()


async def test_sqlite_is_opened_durable_and_with_foreign_keys(url: str) -> None:
    database = Database(url)
    for pragma, value in {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "locking_mode": "exclusive",
    }.items():
        found = await database.run(lambda c, p=pragma: c.exec_driver_sql(f"PRAGMA {p}").scalar_one())
        assert found == value, pragma
    await database.close()
