"""The line of a tenant's jobs behind its cap: who goes next, and how many a job is told to wait for."""

from __future__ import annotations

import asyncio
import random
import re

import pytest

from cola_runtime.job_choices import Priority
from cola_runtime.scheduler.policy import NOT_DUE
from cola_runtime.scheduler.slots import JobSlots
from cola_runtime.scheduler.waiting import Due

TENANT = "acme"
LATE, IN_TIME = 0.0, 1e12  # latest starts, before and after any moment of the loop's clock


def drawn_due(draw: random.Random) -> Due | None:
    if draw.random() < 0.7:
        return None
    return Due(deadline=draw.choice([1e6, 2e6, 3e6]), latest_start=draw.choice([LATE, IN_TIME]))


class Line:
    """Thirty jobs that wait behind one, and the order that sorting the whole line gives."""

    def __init__(self) -> None:
        self.slots, self.entered = JobSlots(), list[str]()
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.keys: dict[str, tuple[float, int, int]] = {}
        self.slots.set_limit(TENANT, 1)

    async def join(self, name: str, *, priority: Priority = Priority.LOW, due: Due | None = None) -> None:
        late = due is not None and due.latest_start == LATE
        self.keys[name] = (due.deadline if due and late else NOT_DUE, -priority, len(self.tasks))
        self.tasks[name] = asyncio.create_task(self._enter(name, priority, due))
        await asyncio.sleep(0)

    async def _enter(self, name: str, priority: Priority, due: Due | None) -> None:
        await self.slots.enter(TENANT, name, priority=priority, due=due)
        self.entered.append(name)

    async def give_up(self, name: str) -> None:
        self.tasks[name].cancel()
        del self.keys[name]
        await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(10))
async def test_each_job_is_told_how_many_go_before_it_and_they_do(seed: int) -> None:
    draw, line = random.Random(seed), Line()
    await line.join("first")
    for number in range(30):
        await line.join(f"job-{number}", priority=draw.choice(list(Priority)), due=drawn_due(draw))
    for name in draw.sample(sorted(line.keys.keys() - {"first"}), 5):
        await line.give_up(name)
    del line.keys["first"]
    order = sorted(line.keys, key=line.keys.__getitem__)
    assert [told(line.slots, name) for name in order] == list(range(len(order)))
    for name in ["first", *order]:
        await asyncio.sleep(0)
        assert line.entered[-1] == name
        line.slots.leave(TENANT, name)


def told(slots: JobSlots, name: str) -> int:
    found = re.search(r"(\d+) wait before it", slots.waiting_reason(TENANT, name) or "")
    assert found is not None
    return int(found[1])
