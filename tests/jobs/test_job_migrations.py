from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from job_samples import new_job
from sqlalchemy import Connection, inspect, text

from cola_runtime.jobs import schema
from cola_runtime.jobs.database import Database
from cola_runtime.jobs.store import JobStore


def _checks(connection: Connection) -> dict[str, set[str]]:
    found = inspect(connection)
    return {
        name: {str(check["name"]) for check in found.get_check_constraints(name)}
        for name in schema.metadata.tables
    }


async def test_migrations_build_exactly_the_declared_schema(empty_url: str) -> None:
    migrated, declared = Database(empty_url), Database("sqlite://")
    await migrated.open()
    await declared.run(schema.metadata.create_all)
    differences = await migrated.run(
        lambda c: compare_metadata(MigrationContext.configure(c), schema.metadata)
    )
    assert differences == []
    assert await migrated.run(_checks) == await declared.run(_checks)
    await migrated.close()
    await declared.close()


async def test_opening_again_keeps_what_is_there(empty_url: str) -> None:
    store = await JobStore.open(empty_url)
    job = await store.create_job(new_job(await store.create_tenant("acme")))
    await store.close()
    store = await JobStore.open(empty_url)
    assert await store.job(job.job_id) == job
    await store.close()


async def test_sqlite_is_opened_durable_and_with_foreign_keys(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/jobs.db")
    for pragma, value in {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "locking_mode": "exclusive",
    }.items():
        found = await database.run(lambda c, p=pragma: c.exec_driver_sql(f"PRAGMA {p}").scalar_one())
        assert found == value, pragma
    await database.close()


def _migrate(connection: Connection, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", "cola_runtime.jobs:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    act = command.downgrade if revision == "0001" and _revision(connection) == "0002" else command.upgrade
    act(config, revision)


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _job_of_the_first_schema(connection: Connection) -> None:
    at = "2026-01-02T03:04:05.000000Z"
    for statement in (
        f"INSERT INTO tenants VALUES ('t', 'acme', '{at}')",
        "INSERT INTO jobs (job_id, tenant_id, name, base_model, spec_json, state, version, total_steps,"
        " epoch, encoding, training_key, request_digest, created_at, evaluation_loss_before,"
        " evaluation_loss_after)"
        f" VALUES ('j', 't', 'chat', 'tiny', '{{}}', 'running', 5, 5, 2, 'x', 'k', 'd', '{at}', 3.5, 2.25)",
        f"INSERT INTO leases VALUES ('j', 1, 'd', '{at}', '{at}'), ('j', 2, 'd', '{at}', NULL)",
    ):
        connection.execute(text(statement))


async def test_held_out_losses_of_the_first_schema_move_to_the_evaluations(empty_url: str) -> None:
    database = Database(empty_url)
    await database.run(lambda c: _migrate(c, "0001"))
    await database.run(_job_of_the_first_schema)
    await database.close()
    store = await JobStore.open(empty_url)
    job = await store.job("j")
    assert (job.evaluation_loss_before, job.evaluation_loss_after) == (3.5, 2.25)
    found = [(each.step, each.epoch, each.value, each.improved) for each in await store.evaluations("j")]
    assert found == [(0, 2, 3.5, True), (5, 2, 2.25, True)]
    await store.close()


async def test_a_downgrade_brings_the_held_out_losses_back(empty_url: str) -> None:
    database = Database(empty_url)
    await database.run(lambda c: _migrate(c, "0001"))
    await database.run(_job_of_the_first_schema)
    await database.run(lambda c: _migrate(c, "0002"))
    await database.run(lambda c: _migrate(c, "0001"))
    losses = "SELECT evaluation_loss_before, evaluation_loss_after FROM jobs"
    assert await database.run(lambda c: tuple(c.execute(text(losses)).one())) == (3.5, 2.25)
    await database.close()
