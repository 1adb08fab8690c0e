"""An audit entry that was asked for is written, whoever stops asking and whenever the store closes."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cola_runtime.jobs import audit
from cola_runtime.jobs.audit import AuditEntry
from cola_runtime.jobs.store import JobStore

ENTRY = AuditEntry(kind="device.left", actor="garage", subject="garage", message="its stream ended")
SECONDS = 10.0


class Busy:
    """A store whose database thread has something else to do for as long as the test wants."""

    def __init__(self, store: JobStore) -> None:
        self.store, self.free = store, threading.Event()
        self._other = asyncio.create_task(store._database.run(lambda _: self.free.wait(SECONDS)))

    async def close(self) -> None:
        """The store closes; the database comes back in the middle of that."""
        closing = asyncio.create_task(self.store.close())
        await asyncio.sleep(0)
        self.free.set()
        await closing
        await self._other


@pytest.fixture
async def busy(url: str) -> Busy:
    busy = Busy(await JobStore.open(url))
    await asyncio.sleep(0)
    return busy


async def written(url: str) -> list[tuple[str, str]]:
    store = await JobStore.open(url)
    found = await store.audit.entries()
    await store.close()
    return [(each.kind, each.message) for each in found]


async def test_what_was_noted_before_the_store_closes_is_in_the_trail(url: str) -> None:
    store = await JobStore.open(url)
    store.audit.note_bounded(ENTRY)
    await store.close()
    assert await written(url) == [(ENTRY.kind, ENTRY.message)]


async def test_who_is_cancelled_while_an_entry_waits_its_turn_leaves_it_all_the_same(
    busy: Busy, url: str
) -> None:
    asking = asyncio.create_task(busy.store.audit.add(ENTRY))
    await asyncio.sleep(0.01)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await busy.close()
    assert await written(url) == [(ENTRY.kind, ENTRY.message)]


async def test_a_store_that_closes_waits_for_entries_within_a_bound_and_says_how_many_are_late(
    busy: Busy, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(audit, "FLUSH_SECONDS", 0.01)
    busy.store.audit.note_bounded(ENTRY)
    await busy.store.audit.flush()
    [told] = [each for each in caplog.records if getattr(each, "event", "") == "audit.lost"]
    assert told.getMessage() == "1 audit entries not written within 0.01 s"
    await busy.close()
