"""A job store or an object storage that cannot work for a while: the job waits, and ends as if it could."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.jobs.database import Database
from cola_runtime.storage import objects
from cola_runtime.testing.exactness import service_for, tenant_client
from cola_runtime.testing.in_process import running_in_process
from tests.faults.fleet_jobs import outcome_of, training
from tests.faults.judging import MODEL, WAIT_SECONDS, Accept, Faultless, fault_job, judge
from tests.faults.processes import Fleet, Zygote, reach, until

OUTAGE_SECONDS = 3.0
SMALL_FILE_BYTES = 4096
FEW = 4

Fail = Callable[[], Exception]


class Outage:
    """While it lasts, whatever asks fails."""

    def __init__(self, fail: Fail) -> None:
        self._fail, self.lasts = fail, False

    def check(self) -> None:
        if self.lasts:
            raise self._fail()


def sql(text: str) -> Fail:
    return lambda: OperationalError("", {}, Exception(text))


def os_error(number: int) -> Fail:
    return lambda: OSError(number, "as told")


def in_store(outage: Outage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every transaction fails at its first statement."""
    run = Database.run

    async def failing(database: Database, work: Callable[[Any], Any], **more: Any) -> Any:
        def checked(connection: Any) -> Any:
            outage.check()
            return work(connection)

        return await run(database, checked, **more)

    monkeypatch.setattr(Database, "run", failing)


def in_storage(outage: Outage, monkeypatch: pytest.MonkeyPatch) -> None:
    write = objects._write_synced

    def failing(path: Path, content: bytes) -> None:
        outage.check()
        write(path, content)

    monkeypatch.setattr(objects, "_write_synced", failing)


CASES = [
    pytest.param("job store locked", in_store, sql("database is locked"), id="locked"),
    pytest.param("job store fails", in_store, sql("disk I/O error"), id="io", marks=pytest.mark.quick),
    pytest.param("object storage full", in_storage, os_error(errno.ENOSPC), id="full"),
    pytest.param("object storage read-only", in_storage, os_error(errno.EROFS), id="read-only"),
]


@pytest.mark.parametrize(("case", "where", "fail"), CASES)
async def test_a_storage_that_fails_for_a_while_fails_no_job(
    case: str,
    where: Callable[[Outage, pytest.MonkeyPatch], None],
    fail: Fail,
    model: Path,
    tmp_path: Path,
    faultless: Faultless,
    accept: Accept,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outage = Outage(fail)
    where(outage, monkeypatch)
    settings = service_for(tmp_path, model=model, name=MODEL, dtype="float32")
    async with running_in_process(settings) as (service, _), await tenant_client(service, "alice") as client:
        handle = await client.submit(fault_job().spec, training=fault_job().training)
        await reach(handle, 4)
        async with lasting(outage) as fault:
            await asyncio.sleep(OUTAGE_SECONDS)
        await handle.wait(WAIT_SECONDS)
        outcome = await judge(handle, faultless, part="storage", case=case, faults=[fault], data_dir=tmp_path)
    accept(outcome)


@asynccontextmanager
async def lasting(outage: Outage) -> AsyncIterator[float]:
    outage.lasts = True
    yield time.time()
    outage.lasts = False


async def test_a_disk_that_takes_no_more_for_a_while_fails_no_job(
    zygote: Zygote, model: Path, tmp_path: Path, faultless: Faultless, accept: Accept
) -> None:
    """The kernel refuses to let the coordinator's files grow: its database and its objects alike."""
    async with training(zygote, tmp_path, model) as (at, _, handle):
        fault = time.time()
        resource.prlimit(at.coordinator, resource.RLIMIT_FSIZE, (SMALL_FILE_BYTES, -1))
        await asyncio.sleep(OUTAGE_SECONDS)
        resource.prlimit(at.coordinator, resource.RLIMIT_FSIZE, (-1, -1))
        accept(await outcome_of(at, handle, faultless, of=("storage", "no file may grow"), faults=[fault]))


async def test_a_coordinator_whose_file_descriptors_are_used_up_goes_on_with_those_that_it_has(
    zygote: Zygote, model: Path, tmp_path: Path, faultless: Faultless, accept: Accept
) -> None:
    """By connections that say nothing: no checkpoint can be stored meanwhile, and nobody new is served."""
    async with training(zygote, tmp_path, model) as (at, client, handle), another_connection(at) as newcomer:
        async with no_descriptor_left(at) as fault:
            assert (await client.describe()).devices, "who is connected is served"
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(newcomer.describe(), OUTAGE_SECONDS)
        assert (await newcomer.describe()).devices
        of = ("storage", "no file descriptor left")
        accept(await outcome_of(at, handle, faultless, of=of, faults=[fault]))


@asynccontextmanager
async def no_descriptor_left(at: Fleet) -> AsyncIterator[float]:
    """Of the coordinator; more connections wait in the kernel for it to accept them."""
    before = resource.prlimit(at.coordinator, resource.RLIMIT_NOFILE)
    used = open_descriptors(at.coordinator)
    resource.prlimit(at.coordinator, resource.RLIMIT_NOFILE, (used + FEW, before[1]))
    host, _, port = at.settings.listen.rpartition(":")
    connections = [await asyncio.open_connection(host, int(port)) for _ in range(3 * FEW)]
    await until(lambda: open_descriptors(at.coordinator) >= used + FEW)
    yield time.time()
    for _, writer in connections:
        writer.transport.abort()
    resource.prlimit(at.coordinator, resource.RLIMIT_NOFILE, before)


def another_connection(at: Fleet) -> AsyncClient:
    """Clients of one process and one address share theirs."""
    port = at.settings.listen.rpartition(":")[2]
    key = (at.settings.data_dir / "key").read_text()
    return AsyncClient(base_url=f"grpc://localhost:{port}", api_key=key)


def open_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))
