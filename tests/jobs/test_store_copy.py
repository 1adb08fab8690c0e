"""A stopped service's job store is copied whole to another database, or not at all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from job_samples import new_job, running, step
from sqlalchemy import Connection, select, text
from test_pins import checkpoint

from cola_runtime.errors import ColaError, Unavailable
from cola_runtime.job_choices import TrustClass
from cola_runtime.jobs import database, schema, store_copy
from cola_runtime.jobs.audit import AuditEntry
from cola_runtime.jobs.database import Database
from cola_runtime.jobs.records import EvaluationRecord, TermChanges
from cola_runtime.jobs.spot_check_rows import PendingCheck
from cola_runtime.jobs.store import JobStore
from cola_runtime.jobs.store_copy import StorePlace, copy_store
from tests.postgres import PostgresServer


@pytest.fixture(params=["sqlite", "postgresql"])
async def places(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    postgres: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[tuple[StorePlace, StorePlace]]:
    """From a folder to a server's empty database, or back; most tables have more rows than travel at once."""
    monkeypatch.setattr(store_copy, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr(store_copy, "BATCHES_AHEAD", 1)
    url = postgres.new_database()
    both = StorePlace.of(str(tmp_path / "service")), StorePlace.of(url)
    yield both if request.param == "sqlite" else both[::-1]
    postgres.drop(url)


async def filled(place: StorePlace) -> str:
    """A store with a row in every table; returns a key that is valid in it."""
    if place.folder is not None:
        place.folder.mkdir()
    store = await JobStore.open(place.url)
    tenant = await store.create_tenant("acme")
    await store.accounts.change_terms(tenant.tenant_id, TermChanges(weight=1 / 3, concurrent_jobs=2**40))
    key = await store.create_key("acme")
    lease = await running(store, tenant)
    await store.record_step(step(lease, 1))
    await store.record_evaluation(
        EvaluationRecord(
            job_id=lease.job_id,
            step=1,
            epoch=lease.epoch,
            metrics={"loss": 0.1 + 0.2, "accuracy": 1 / 3},
            primary="loss",
            greater_is_better=False,
            improved=True,
        )
    )
    pending = PendingCheck(
        job_id=lease.job_id,
        epoch=lease.epoch,
        first=0,
        last=1,
        device_ids=("d", "e"),
        shards=(1,),
        replica="tiny/0",
    )
    await store.checkpoints.record(checkpoint(lease, 1), check=pending)
    for number in range(8):
        await store.add_event(lease.job_id, "note", "\N{SNOWMAN} 'quoted'", data={"number": number / 7})
    await store.create_job(new_job(tenant, name="another"))
    token, _ = await store.devices.create_token(
        TrustClass.COMMUNITY, reusable=True, valid=timedelta(hours=1), created_by="key"
    )
    await store.devices.join(token, "garage", "0" * 64, until=store._now() + timedelta(days=1))
    await store.devices.quarantine("garage", "FRAME_CHECKSUM", "damaged")
    await store.audit.add(AuditEntry(kind="key.created", actor="operator"))
    await store.close()
    return key


async def contents(place: StorePlace) -> dict[str, list[tuple[Any, ...]]]:
    def read(connection: Connection) -> dict[str, list[tuple[Any, ...]]]:
        tables = schema.metadata.sorted_tables
        found = {table.name: [tuple(row) for row in connection.execute(select(table))] for table in tables}
        return {name: sorted(rows, key=repr) for name, rows in found.items()}

    opened = Database(place.url)
    found = await opened.run(read)
    await opened.close()
    return found


async def refused(source: StorePlace, target: StorePlace) -> str:
    with pytest.raises(ColaError) as caught:
        await copy_store(source, target)
    return caught.value.reason


async def test_every_table_arrives_as_it_was_and_the_store_goes_on(
    places: tuple[StorePlace, StorePlace],
) -> None:
    source, target = places
    key = await filled(source)
    before = await contents(source)
    assert all(before.values()), [name for name, rows in before.items() if not rows]
    copied = await copy_store(source, target)
    assert {each.table: each.rows for each in copied} == {name: len(rows) for name, rows in before.items()}
    assert await contents(target) == before == await contents(source)
    store = await JobStore.open(target.url)
    assert (await store.authenticate(key)) is not None
    [job] = await store.jobs(limit=1)
    last = max(row[0] for row in before["events"])
    assert (await store.add_event(job.job_id, "note", "behind the others")).id == last + 1
    await store.close()
    assert await refused(source, target) == "STORE_NOT_EMPTY"


async def test_neither_store_is_copied_while_somebody_holds_it(
    places: tuple[StorePlace, StorePlace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MILLISECONDS", 10)
    source, target = places
    await filled(source)
    store = await JobStore.open(source.url)
    assert await refused(source, target) == "STORE_BUSY"
    await store.close()
    if target.folder is not None:
        target.folder.mkdir(exist_ok=True)
    store = await JobStore.open(target.url)
    assert await refused(source, target) == "STORE_BUSY"
    await store.close()
    await copy_store(source, target)  # it has tables, and nothing in them


async def test_a_copy_that_fails_in_the_middle_leaves_nothing(
    places: tuple[StorePlace, StorePlace], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = places
    await filled(source)
    rows_of = store_copy._rows

    def fails(connection: Connection, table: Any) -> Any:
        if table is schema.events:
            raise Unavailable("STORE_FAILED", "the disk is gone")
        return rows_of(connection, table)

    with monkeypatch.context() as patch:
        patch.setattr(store_copy, "_rows", fails)
        assert await refused(source, target) == "STORE_FAILED"
    opened = Database(target.url)
    assert await opened.run(store_copy._revision) is None
    await opened.close()


async def test_rows_that_come_out_otherwise_are_no_copy(
    places: tuple[StorePlace, StorePlace], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = places
    await filled(source)
    number_on = store_copy._number_on

    def spoil(connection: Connection) -> None:
        number_on(connection)
        connection.execute(schema.steps.update().values(loss=schema.steps.c.loss * (1 + 2**-52)))

    with monkeypatch.context() as patch:
        patch.setattr(store_copy, "_number_on", spoil)
        assert await refused(source, target) == "STORE_FAILED"
    await copy_store(source, target)


async def test_tables_of_another_release_are_refused_on_either_side(
    places: tuple[StorePlace, StorePlace],
) -> None:
    source, target = places
    await filled(source)
    older = text("UPDATE alembic_version SET version_num = '0007'")
    newest = text(f"UPDATE alembic_version SET version_num = '{store_copy._newest_revision()}'")
    for place, statement in ((source, older), (source, newest), (target, older)):
        if place is target:
            await copy_store(source, target)
        opened = Database(place.url)
        await opened.run(lambda c, s=statement: c.execute(s) and None)
        await opened.close()
        if statement is older:
            assert await refused(source, target) == "STORE_MISMATCH"


async def test_a_folder_of_another_stores_objects_is_no_target(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    url = postgres.new_database()
    source, target = StorePlace.of(url), StorePlace.of(str(tmp_path))
    await filled(source)
    (tmp_path / "store-id").write_text("another")
    assert await refused(source, target) == "STORE_MISMATCH"
    assert await refused(StorePlace.of(str(tmp_path / "nothing")), source) == "STORE_MISSING"
    with pytest.raises(ColaError) as caught:
        StorePlace.of("mysql://localhost/cola")
    assert caught.value.reason == "STORE_PLACE_INVALID"
    postgres.drop(url)
