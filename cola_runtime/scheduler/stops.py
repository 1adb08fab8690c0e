"""Pausing, cancelling, draining: asked of a job at any time, acted on at its next step boundary."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Coroutine
from typing import Any, TypeVar

from cola_runtime.jobs.state import JobState, Trigger

T = TypeVar("T")

AT_COORDINATORS_END = "since the coordinator stops: it goes on from a checkpoint of this version"
AT_REQUEST = "at its tenant's request"


class Stop(enum.Enum):
    """What a tenant asked for, or the operator; acted on at the next step boundary."""

    PAUSE = JobState.PAUSED
    CANCEL = JobState.CANCELLED
    DRAIN = JobState.QUEUED  # the coordinator stops; the job goes on when there is one again

    @property
    def trigger(self) -> Trigger:
        return _TRIGGERS[self]

    def told(self, why: str) -> str:
        """For the job's trail; `why` ends the sentence."""
        return f"{self.value} {why}"


_TRIGGERS = {Stop.PAUSE: Trigger.PAUSE, Stop.CANCEL: Trigger.CANCEL, Stop.DRAIN: Trigger.REQUEUE}


class Stopped(Exception):
    """The job is to end as `stop` says."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop


class StopRequest:
    """What one job was asked for last; `asked` is None as long as it may go on."""

    def __init__(self) -> None:
        self.asked: Stop | None = None
        self.why = ""
        self._event = asyncio.Event()
        self._taken = False

    def ask(self, stop: Stop, *, why: str = AT_REQUEST) -> None:
        """Stop at the next step boundary; a cancel overrides a pause, and either a drain. `why` ends a
        sentence.
        """
        if self.asked is None or stop is Stop.CANCEL or self.asked is Stop.DRAIN:
            self.asked, self.why = stop, why
            self._event.set()

    def withdraw_pause(self) -> bool:
        """Go on although a pause was asked for; False when it is too late, or a cancel was asked for."""
        if self.asked is Stop.CANCEL or self._taken:
            return False
        self.asked = None
        self._event.clear()
        return True

    def check(self) -> None:
        """Raises Stopped if one was asked for; from then on it is not withdrawn."""
        if self.asked is not None:
            self._taken = True
            raise Stopped(self.asked)

    async def unless_asked(self, opening: Coroutine[Any, Any, T]) -> T:
        """Await an opening, but give up as soon as the tenant asks to stop."""
        task = asyncio.create_task(opening)
        try:
            while not task.done():
                asked = asyncio.create_task(self._event.wait())
                futures: set[asyncio.Task[Any]] = {task, asked}
                await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
                asked.cancel()
                if not task.done():
                    self.check()
            return task.result()
        finally:
            if task.cancel():
                await asyncio.wait({task})
