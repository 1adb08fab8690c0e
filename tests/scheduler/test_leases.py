"""Who is woken by what: the lease book."""

from __future__ import annotations

import asyncio

import pytest

from cola_runtime.scheduler.leases import LeaseBook, LeaseLost
from cola_runtime.types import Lease, StepApplied

LEASE = Lease(job_id="job-1", epoch=2, device_id="d0")
OLDER = Lease(job_id="job-1", epoch=1, device_id="d1")


async def test_a_waiter_wakes_when_its_version_reaches_the_bank() -> None:
    book = LeaseBook()
    book.open(LEASE, replica="tiny/0")
    waiter = asyncio.create_task(book.wait_version(LEASE, 3, timeout_seconds=5))
    await asyncio.sleep(0)
    book.applied(StepApplied(lease=LEASE, version=2))
    await asyncio.sleep(0)
    assert not waiter.done()
    book.applied(StepApplied(lease=LEASE, version=3))
    assert (await waiter).version == 3


async def test_each_version_is_handed_out_with_its_own_report() -> None:
    book = LeaseBook()
    book.open(LEASE, replica="tiny/0")
    for version in (2, 3):
        book.applied(StepApplied(lease=LEASE, version=version, gradient_norm=float(version)))
    for version in (2, 3):
        report = await book.wait_version(LEASE, version, timeout_seconds=5)
        assert (report.version, report.gradient_norm) == (version, float(version))


async def test_reports_of_an_older_epoch_are_ignored() -> None:
    book = LeaseBook()
    book.open(LEASE, replica="tiny/0")
    book.applied(StepApplied(lease=OLDER, version=9))
    book.lose(OLDER, reason="DEVICE_LOST", message="the old device")
    with pytest.raises(LeaseLost, match="did not reach the bank within"):
        await book.wait_version(LEASE, 9, timeout_seconds=0.01)


async def test_losing_a_device_wakes_all_its_waiters_and_nobody_else() -> None:
    book = LeaseBook()
    other = Lease(job_id="job-2", epoch=1, device_id="d1")
    book.open(LEASE, replica="tiny/0")
    book.open(other, replica="tiny/0")
    waiters = [
        asyncio.create_task(book.wait_version(lease, 1, timeout_seconds=5)) for lease in (LEASE, other)
    ]
    await asyncio.sleep(0)
    book.lose_device("d0", reason="DEVICE_LOST", message="gone")
    with pytest.raises(LeaseLost, match="gone"):
        await waiters[0]
    assert not waiters[1].done()
    book.applied(StepApplied(lease=other, version=1))
    await waiters[1]
    with pytest.raises(LeaseLost):
        book.check(LEASE)


async def test_losing_one_shards_device_ends_the_lease_for_all_of_them() -> None:
    book = LeaseBook()
    sharded = Lease(job_id="job-1", epoch=2, device_id="d1", further_device_ids=("d0",))
    book.open(sharded, replica="tiny/0")
    assert book.on_device("d0") == book.on_device("d1") == [sharded]
    waiter = asyncio.create_task(book.wait_version(sharded, 1, timeout_seconds=5))
    await asyncio.sleep(0)
    book.lose_device("d0", reason="DEVICE_LOST", message="gone")
    with pytest.raises(LeaseLost, match="gone"):
        await waiter


async def test_closing_a_lease_ends_waits_on_it() -> None:
    book = LeaseBook()
    book.open(LEASE, replica="tiny/0")
    waiter = asyncio.create_task(book.wait_checkpoint(LEASE, 1, timeout_seconds=5))
    await asyncio.sleep(0)
    book.close(LEASE)
    with pytest.raises(LeaseLost, match="no longer open"):
        await waiter


async def test_a_lost_link_takes_the_leases_that_had_begun_and_leaves_one_that_opens() -> None:
    """As when a device died and is back: word of its old stream comes behind its new lease."""
    book = LeaseBook()
    begun, opening = LEASE, Lease(job_id="job-2", epoch=1, device_id="d0")
    book.open(begun, replica="tiny/0")
    book.open(opening, replica="tiny/0")
    book.applied(StepApplied(lease=begun, version=0))
    book.lose_link("d0", replica="tiny/0", reason="DEVICE_LINK_LOST", message="it left the base model")
    with pytest.raises(LeaseLost, match="it left"):
        book.check(begun)
    book.applied(StepApplied(lease=opening, version=0))
    assert (await book.wait_version(opening, 0, timeout_seconds=5)).version == 0
