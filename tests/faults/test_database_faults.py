"""A job store on a real PostgreSQL server that dies, hangs up or loses a commit while a job trains."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import Connection

from cola_runtime.client import connection
from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.errors import Unavailable
from cola_runtime.jobs.hold import Hold
from cola_runtime.testing.exactness import service_for, tenant_client
from cola_runtime.testing.in_process import InProcessDevices, running_in_process
from tests.faults.judging import MODEL, WAIT_SECONDS, Accept, Faultless, fault_job, judge
from tests.faults.processes import reach
from tests.lossy_wire import Cut, LossyWire
from tests.postgres import TEMPLATE, PostgresServer

SHORT_SECONDS = 2.0
LONG_SECONDS = 60.0
LOST_COMMITS = 5


@dataclass(frozen=True, slots=True)
class Attacked:
    """What a fault can be done to."""

    server: PostgresServer
    url: str
    cuts: list[Cut]  # of the next commits of transactions that write
    handle: AsyncJobHandle
    client: AsyncClient
    devices: InProcessDevices
    endpoint: str  # of the devices


async def _down(at: Attacked, mode: str, seconds: float) -> None:
    await asyncio.to_thread(at.server.stop, mode)
    try:
        await asyncio.sleep(seconds / 2)
        known = await at.handle.refresh()  # reads go on, of what was known
        assert known.stale and known.version >= 4
        with pytest.raises(Unavailable, match="cannot be reached"):
            await at.handle.cancel()
        await asyncio.sleep(seconds / 2)
    finally:
        await asyncio.to_thread(at.server.start)


async def _crash(at: Attacked) -> None:
    await _down(at, "immediate", SHORT_SECONDS)


async def _crash_for_long(at: Attacked) -> None:
    await _down(at, "immediate", LONG_SECONDS)


async def _shut_down(at: Attacked) -> None:
    await _down(at, "fast", SHORT_SECONDS)


async def _crash_and_break(at: Attacked) -> None:
    """Both streams of the device break while the server is down: it is back before that, a new one is not."""
    [holder] = [each for each in (await at.client.describe()).devices if each.jobs]
    agent = at.devices.agents[holder.device_id]
    await asyncio.to_thread(at.server.stop, "immediate")
    try:
        session = agent._session
        assert session is not None
        links = session._links._links
        [(endpoint, link)] = links.items()
        await link.close()
        # It is dialled again, unless the coordinator has heard of it first and ended the lease.
        await _until(lambda: links.get(endpoint) is not link)
        session._links._ended.set_exception(Unavailable("STREAM_LOST", "its control stream breaks"))
        await _until(lambda: agent._session not in (None, session))
        assert holder.device_id in await _connected(at)
        at.devices.start("stranger", at.endpoint)
        await asyncio.sleep(SHORT_SECONDS)
        assert "stranger" not in await _connected(at)
    finally:
        await asyncio.to_thread(at.server.start)
    await _until(lambda: at.devices.agents["stranger"]._session is not None)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def _connected(at: Attacked) -> set[str]:
    return {each.device_id for each in (await at.client.describe()).devices}


async def _terminate(at: Attacked) -> None:
    for _ in range(20):
        await asyncio.to_thread(at.server.end_sessions, at.url)
        await asyncio.sleep(0.02)


def _lose(cut: Cut) -> Callable[[Attacked], Awaitable[None]]:
    async def lose(at: Attacked) -> None:
        at.cuts.extend([cut] * LOST_COMMITS)
        async with asyncio.timeout(WAIT_SECONDS):
            while at.cuts:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    return lose


CASES = [
    pytest.param("server crashes", _crash, SHORT_SECONDS, id="crash", marks=pytest.mark.quick),
    pytest.param("server down for 60 s", _crash_for_long, LONG_SECONDS, id="60s"),
    pytest.param(
        "server crashes, streams break",
        _crash_and_break,
        SHORT_SECONDS,
        id="streams",
        marks=pytest.mark.quick,
    ),
    pytest.param("server shut down and started", _shut_down, SHORT_SECONDS, id="restart"),
    pytest.param("backends terminated", _terminate, 0.0, id="terminated"),
    pytest.param("connection lost before a commit", _lose(Cut.COMMIT), 0.0, id="commit"),
    pytest.param("a commit's answer lost", _lose(Cut.ANSWER), 0.0, id="answer"),
]


@pytest.fixture
def url(postgres: PostgresServer) -> Iterator[str]:
    made = postgres.new_database(template=TEMPLATE)
    yield made
    postgres.drop(made)


def cut_writes(wire: LossyWire, monkeypatch: pytest.MonkeyPatch) -> list[Cut]:
    """Cuts that are put into the list are made one after the other; reads commit uncut."""
    cuts: list[Cut] = []
    mark = Hold.mark

    def marked(hold: Hold, connection: Connection) -> int | None:
        number = mark(hold, connection)
        wire.cut = cuts.pop() if cuts else None
        return number

    monkeypatch.setattr(Hold, "mark", marked)
    return cuts


@pytest.mark.parametrize(("case", "attack", "outage_seconds"), CASES)
async def test_a_lost_database_fails_no_job(
    case: str,
    attack: Callable[[Attacked], Awaitable[None]],
    outage_seconds: float,
    model: Path,
    tmp_path: Path,
    postgres: PostgresServer,
    url: str,
    faultless: Faultless,
    accept: Accept,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "RETRY_DELAYS_SECONDS", ())  # the client's: each refusal is seen
    async with LossyWire.to(url) as (wire, behind):
        cuts = cut_writes(wire, monkeypatch)
        settings = service_for(tmp_path, model=model, name=MODEL, dtype="float32").model_copy(
            update={"database": SecretStr(behind)}
        )
        async with (
            running_in_process(settings) as (service, devices),
            await tenant_client(service, "alice") as client,
        ):
            handle = await client.submit(fault_job().spec, training=fault_job().training)
            await reach(handle, 4)
            fault = time.time()
            await attack(Attacked(postgres, url, cuts, handle, client, devices, service.device_endpoint))
            await handle.wait(WAIT_SECONDS)
            outcome = await judge(
                handle,
                faultless,
                part="storage",
                case=case,
                faults=[fault],
                data_dir=tmp_path,
                outage_seconds=outage_seconds,
            )
    accept(outcome)
