"""`cola doctor` tells of a job store on PostgreSQL whether it is there, of which release, and who writes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from cola_runtime.cli import checks
from cola_runtime.jobs.store import JobStore
from tests.postgres import TEMPLATE, PostgresServer


@pytest.fixture
def url(postgres: PostgresServer) -> Iterator[str]:
    made = postgres.new_database(template=TEMPLATE)
    yield made
    postgres.drop(made)


async def test_who_holds_the_store_is_told(url: str) -> None:
    assert "no coordinator holds it" in checks.check_database(url).finding
    store = await JobStore.open(url)
    held = checks.check_database(url)
    assert held.status == "ok"
    assert f"held by cola coordinator {os.uname().nodename[:30]} {os.getpid()} at 127.0.0.1" in held.finding
    await store.close()


def test_tables_that_are_missing_or_of_another_release(postgres: PostgresServer, url: str) -> None:
    empty = postgres.new_database()
    assert "no tables yet, which `cola serve` brings to" in checks.check_database(empty).finding
    postgres.drop(empty)
    postgres.execute("UPDATE alembic_version SET version_num = '9999'", database=url.rpartition("/")[2])
    newer = checks.check_database(url)
    assert (newer.status, "(9999) are of a newer release" in newer.finding) == ("fail", True)


def test_a_database_that_cannot_be_reached_fails_without_its_password() -> None:
    found = checks.check_database("postgresql://cola:hunter2@127.0.0.1:1/cola")
    assert (found.status, "STORE_UNREACHABLE" in found.finding) == ("fail", True)
    assert "hunter2" not in found.finding + found.remedy
