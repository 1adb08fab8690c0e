"""Moves a job between replicas at a step of the test's choice."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any

import pytest

from cola_runtime.jobs.records import JobRecord, StepRecord
from cola_runtime.jobs.store import JobStore
from cola_runtime.scheduler.leases import LeaseBook
from cola_runtime.scheduler.placement import Move
from cola_runtime.scheduler.replicas import Residents


def move_once(monkeypatch: pytest.MonkeyPatch, *, at: int) -> None:
    """The only job is moved when it has recorded `at` steps, whatever the rule says of one job."""
    reached, asked = asyncio.Event(), asyncio.Event()
    ask_move = LeaseBook.ask_move

    def rebalance(self: Residents, ready: Sequence[str], movable: Collection[str]) -> list[Move]:
        if not reached.is_set() or asked.is_set() or not movable:
            return []
        [job_id], source = movable, self.of(next(iter(movable)))
        target = next(name for name in ready if name != source)
        self._jobs[job_id].replica = target
        return [Move(job_id=job_id, source=str(source), target=target)]

    def ask(self: LeaseBook, *arguments: Any) -> None:
        ask_move(self, *arguments)
        asked.set()

    record_step = JobStore.record_step

    async def record(self: JobStore, step: StepRecord) -> JobRecord:
        job = await record_step(self, step)
        if step.step == at:
            reached.set()
            await asked.wait()
        return job

    monkeypatch.setattr(Residents, "rebalance", rebalance)
    monkeypatch.setattr(LeaseBook, "ask_move", ask)
    monkeypatch.setattr(JobStore, "record_step", record)
