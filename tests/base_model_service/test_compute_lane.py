"""One thing at a time, urgent work first, and the event log's promises."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cola_runtime.base_model.compute_lane import ComputeLane
from cola_runtime.base_model.event_log import EventLog
from cola_runtime.errors import Conflict
from cola_runtime.types import BaseEvent, DeviceLinkChanged


async def test_urgent_work_goes_before_what_waits_but_never_into_what_runs() -> None:
    lane, order, begun, release = ComputeLane(), [], threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert release.wait(10)
        order.append("running")

    running = asyncio.create_task(lane.run(hold))
    await asyncio.to_thread(begun.wait, 10)
    waiting = [asyncio.create_task(lane.run(lambda n=n: order.append(f"step {n}"))) for n in range(2)]
    await asyncio.sleep(0)
    urgent = asyncio.create_task(lane.run(lambda: order.append("install"), urgent=True))
    await asyncio.sleep(0)
    release.set()
    await asyncio.gather(running, *waiting, urgent)
    lane.stop()
    assert order == ["running", "install", "step 0", "step 1"]


async def test_what_work_raises_reaches_its_caller_and_the_lane_goes_on() -> None:
    lane = ComputeLane()
    with pytest.raises(ZeroDivisionError):
        await lane.run(lambda: 1 // 0)
    assert await lane.run(lambda: 7) == 7
    lane.stop()


async def test_everything_runs_on_one_thread() -> None:
    lane = ComputeLane()
    threads = await asyncio.gather(*(lane.run(threading.get_ident) for _ in range(20)))
    lane.stop()
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


def event(number: int) -> BaseEvent:
    return DeviceLinkChanged(device_id=f"d{number}", connected=True, parked=False)


async def test_a_long_poll_ends_with_the_first_event() -> None:
    log = EventLog()
    poll = asyncio.create_task(log.after(0, timeout_seconds=10))
    await asyncio.sleep(0.01)
    assert not poll.done()
    log.append(event(1))
    assert await asyncio.wait_for(poll, 5) == (1, [event(1)])
    assert await log.after(1, timeout_seconds=0.01) == (1, [])


async def test_two_readers_are_both_woken() -> None:
    log = EventLog()
    polls = [asyncio.create_task(log.after(0, timeout_seconds=10)) for _ in range(2)]
    await asyncio.sleep(0.01)
    log.append(event(1))
    assert await asyncio.wait_for(asyncio.gather(*polls), 5) == [(1, [event(1)])] * 2


async def test_dropped_events_are_told_and_a_reader_that_begins_again_gets_the_kept_ones() -> None:
    log = EventLog(capacity=3)
    log.append(event(1))
    assert await log.after(0) == (1, [event(1)])
    for number in range(2, 6):
        log.append(event(number))
    with pytest.raises(Conflict) as caught:
        await log.after(1)
    assert caught.value.reason == "EVENTS_LOST"
    kept = [event(3), event(4), event(5)]
    assert await log.after(0) == (5, kept)
    assert await log.after(2) == (5, kept), "its answer was lost on the way"
    with pytest.raises(Conflict):
        await log.after(6)


async def test_what_was_read_is_forgotten() -> None:
    log = EventLog()
    for number in range(1, 6):
        log.append(event(number))
    assert await log.after(3) == (5, [event(4), event(5)])
    assert await log.after(0) == (5, [event(4), event(5)])
    log.append(event(6))
    assert await log.after(5) == (6, [event(6)])
