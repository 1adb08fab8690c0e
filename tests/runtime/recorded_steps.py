"""Doing something at a known step: in the driver's own turn, so that no load can make it late."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from cola_runtime.jobs.records import JobRecord, StepRecord
from cola_runtime.jobs.store import JobStore


def when_recorded(
    store: JobStore, step: int, act: Callable[[StepRecord], Awaitable[object]], patch: pytest.MonkeyPatch
) -> None:
    """Call `act` once, right after any job's `step` is recorded and before its driver goes on."""
    record_step = store.record_step
    acted = False

    async def record_and_act(record: StepRecord) -> JobRecord:
        nonlocal acted
        job = await record_step(record)
        if record.step == step and not acted:
            acted = True
            await act(record)
        return job

    patch.setattr(store, "record_step", record_and_act)
