"""Deadlines: how much a job still needs by its own pace, and who notices when one has passed."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import datetime

from cola_runtime import clock
from cola_runtime.jobs.records import JobRecord
from cola_runtime.jobs.store import JobStore
from cola_runtime.scheduler.waiting import Due
from cola_runtime.spec import JobSpec

logger = logging.getLogger(__name__)

SPARE = 1.5  # times the estimated work must fit before the deadline, or it is in danger
PACE_STEPS = 8  # the latest steps that the pace is the mean of


class Pace:
    """How fast a job goes, and so by when it must be served to meet its deadline. Pure.

    A step takes what the latest ones took on the average, waiting included, and never less than its tokens
    take in base steps: a job that was never served has a pace, too.
    """

    def __init__(self, *, deadline: float, steps: int) -> None:
        self._deadline, self._steps = deadline, steps
        self._seconds: deque[float] = deque(maxlen=PACE_STEPS)

    def step_took(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def due(self, version: int, *, base_seconds: float) -> Due:
        """As of the step behind `version`, which takes so many seconds in base steps."""
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else 0.0
        work = (self._steps - version) * max(mean, base_seconds)
        return Due(deadline=self._deadline, latest_start=self._deadline - SPARE * work)


class DeadlineWatch:
    """A timer for every job with a deadline; that one was missed is recorded once, whatever the job does."""

    def __init__(self, store: JobStore, *, cancel: Callable[[str], Awaitable[None]]) -> None:
        self._store, self._cancel = store, cancel
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._missing: set[asyncio.Task[None]] = set()

    def watch(self, job: JobRecord) -> None:
        """Until its deadline; a job that is watched already is not watched twice."""
        if job.deadline_at is None or job.deadline_missed_at is not None or job.job_id in self._timers:
            return
        loop = asyncio.get_running_loop()
        self._timers[job.job_id] = loop.call_later(seconds_until(job.deadline_at), self._passed, job.job_id)

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()

    def _passed(self, job_id: str) -> None:
        task = asyncio.create_task(self._miss(job_id), name=f"deadline of {job_id}")
        self._missing.add(task)
        task.add_done_callback(self._missing.discard)

    async def _miss(self, job_id: str) -> None:
        del self._timers[job_id]
        try:
            missed = await self._store.miss_deadline(job_id)
            if missed is None:
                return  # it has ended in time
            deadline = JobSpec.model_validate_json(missed.spec_json).deadline
            if deadline is not None and deadline.when_missed == "cancel":
                await self._cancel(job_id)
        except Exception:
            logger.exception("deadline", extra={"event": "deadline.internal_error", "job_id": job_id})


def seconds_until(moment: str) -> float:
    """From now to an RFC 3339 time; 0 if it has passed."""
    return max(0.0, (datetime.fromisoformat(moment) - clock.now()).total_seconds())
