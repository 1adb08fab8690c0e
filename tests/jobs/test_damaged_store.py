"""A job store's file that is damaged is named before anything is written, and while it is used, for good."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from job_samples import new_job

from cola_runtime.cli import checks
from cola_runtime.errors import Unavailable
from cola_runtime.jobs.store import JobStore
from cola_runtime.scheduler.patience import is_outage

PAGE_BYTES = 4096
GARBAGE = b"\xa5"


async def filled(path: Path, *, jobs: int = 40) -> Path:
    """A store of a few dozen pages."""
    store = await JobStore.open(f"sqlite:///{path}")
    tenant = await store.create_tenant("acme")
    for number in range(jobs):
        job = await store.create_job(new_job(tenant, name=f"job-{number}"))
        await store.add_event(job.job_id, "note", "x" * 1000)
    await store.close()
    return path


def a_page(path: Path) -> None:
    overwrite(path, first_page=path.stat().st_size // PAGE_BYTES // 2, pages=1)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_database(path: Path) -> None:
    path.write_bytes(b"%PDF-1.7 no database\n" * 1000)


def emptied(path: Path) -> None:
    """By who truncated it; the transactions behind the last checkpoint are still there."""
    path.with_name(f"{path.name}-wal").write_bytes(path.read_bytes()[:PAGE_BYTES])
    path.write_bytes(b"")


def overwrite(path: Path, *, first_page: int, pages: int) -> None:
    with path.open("r+b") as file:
        file.seek(first_page * PAGE_BYTES)
        file.write(GARBAGE * PAGE_BYTES * pages)


def contents(folder: Path) -> dict[str, bytes]:
    """Files with anything in them, but for what SQLite makes to look at a -wal."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith("-shm")}
    return {name: content for name, content in found.items() if content}


def restore(path: Path, whole: bytes) -> None:
    for left in path.parent.iterdir():
        left.unlink()
    path.write_bytes(whole)


@pytest.mark.parametrize("damage", [a_page, cut_off, no_database, emptied])
async def test_a_damaged_file_is_named_at_the_start_and_not_touched(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = await filled(tmp_path / "jobs.sqlite")
    whole = path.read_bytes()
    await asyncio.to_thread(damage, path)
    before = contents(tmp_path)
    with pytest.raises(Unavailable) as caught:
        await JobStore.open(f"sqlite:///{path}")
    assert (caught.value.reason, caught.value.where) == ("STORE_CORRUPT", str(path))
    assert "put back a copy" in caught.value.remedy
    found = checks.check_store(path)
    assert (found.status, str(path) in found.finding) == ("fail", True)
    assert contents(tmp_path) == before
    restore(path, whole)
    store = await JobStore.open(f"sqlite:///{path}")
    assert len(await store.jobs()) == 40
    await store.close()


async def test_a_file_that_is_damaged_while_it_is_used_is_written_to_no_more(tmp_path: Path) -> None:
    path = await filled(tmp_path / "jobs.sqlite")
    store = await JobStore.open(f"sqlite:///{path}")
    await store._database.run(lambda c: c.exec_driver_sql("PRAGMA cache_size = 1"))
    whole = path.read_bytes()
    overwrite(path, first_page=2, pages=path.stat().st_size // PAGE_BYTES - 2)
    for _ in range(2):
        with pytest.raises(Unavailable) as caught:
            await store.jobs()
        assert (caught.value.reason, caught.value.where) == ("STORE_CORRUPT", str(path))
        assert is_outage(caught.value), "jobs wait: nothing is wrong with them"
    before = contents(tmp_path)
    with pytest.raises(Unavailable) as refused:
        await store.create_tenant("other")
    assert refused.value is store.outage
    assert contents(tmp_path) == before
    with path.open("r+b") as file:
        file.write(whole)
    with pytest.raises(Unavailable):
        await store.tenants()  # until it is opened again: what the pages in memory are of is not known
    await store.close()


async def test_a_whole_file_that_a_killed_coordinator_left_opens_with_all_that_it_had(tmp_path: Path) -> None:
    """The last transactions are in its -wal only, and the look at the file must not lose them."""
    path = tmp_path / "killed.sqlite"
    store = await JobStore.open(f"sqlite:///{path}")
    await store.create_tenant("acme")
    left = contents(tmp_path)
    await store.close()
    assert left["killed.sqlite-wal"]
    for name, content in left.items():
        (tmp_path / name).write_bytes(content)
    again = await JobStore.open(f"sqlite:///{path}")
    assert [tenant.name for tenant in await again.tenants()] == ["acme"]
    await again.close()
