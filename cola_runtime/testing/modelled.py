"""A base model and devices that only take time: for benchmarks that drive the real scheduler."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cola_runtime.job_choices import Priority
from cola_runtime.rows import Row
from cola_runtime.scheduler.loop import SchedulerLoop
from cola_runtime.scheduler.packing import measured
from cola_runtime.types import BaseStep, BaseStepResult, Lease, Segment, SegmentLoss

STEP_SECONDS = 0.05
TOKEN_SECONDS = 0.0072
"""Of SmolLM2-135M in float32 on one core: 7.4 s for 8 x 128 tokens (benchmarks/README.md, base step)."""
DEVICE_SECONDS = 0.05
"""A device's part of a step, adapter_gradient taps of SmolLM2 (benchmarks/README.md, wire: 0.048 s)."""


@dataclass(frozen=True, slots=True)
class ComputedStep:
    """One base step, in the order in which they ended."""

    number: int
    ended: float
    tokens_by_job: dict[str, int]  # without padding


class ModelledBase:
    """Computes base steps one after another, each in STEP_SECONDS + TOKEN_SECONDS per computed token.

    `unpadded`: it computes the rows' own tokens; else they are padded to the longest.
    """

    def __init__(self, *, unpadded: bool = False) -> None:
        self.unpadded = unpadded
        self.steps: list[ComputedStep] = []
        self._compute = asyncio.Lock()
        self._ended = asyncio.Condition()

    async def done(self, steps: int) -> None:
        """Return when so many base steps have ended."""
        async with self._ended:
            await self._ended.wait_for(lambda: len(self.steps) >= steps)

    async def run(self, step: BaseStep) -> BaseStepResult:
        rows = [row for segment in step.segments for row in segment.rows]
        count, size = measured(rows, unpadded=self.unpadded)
        computed = count * size.total
        async with self._compute:
            seconds = STEP_SECONDS + TOKEN_SECONDS * computed
            await asyncio.sleep(seconds)
        ended = asyncio.get_running_loop().time()
        by_job = {segment.lease.job_id: segment.tokens for segment in step.segments}
        self.steps.append(ComputedStep(step.number, ended, by_job))
        async with self._ended:
            self._ended.notify_all()
        losses = tuple(SegmentLoss(job_id=segment.lease.job_id) for segment in step.segments)
        return BaseStepResult(
            number=step.number,
            losses=losses,
            started=ended - seconds,
            seconds=seconds,
            computed_tokens=computed,
            real_tokens=sum(row.length for row in rows),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelledJob:
    """A job of endless steps: `rows` rows of lengths drawn by `draw`, then its device's part."""

    job_id: str
    tenant_id: str
    rows: int
    draw: Callable[[random.Random], int]
    priority: Priority = Priority.NORMAL
    device_seconds: float = DEVICE_SECONDS

    async def run(self, loop: SchedulerLoop, *, seed: str, latencies: list[float] | None = None) -> None:
        drawn = random.Random(seed)  # noqa: S311 (no secret)
        clock = asyncio.get_running_loop().time
        version = 0
        while True:
            started = clock()
            lengths = [self.draw(drawn) for _ in range(self.rows)]
            computing = (
                loop.compute(segment, tenant_id=self.tenant_id, train=True, priority=self.priority)
                for segment in self._segments(lengths, version, loop)
            )
            await asyncio.gather(*computing)
            await asyncio.sleep(self.device_seconds)
            version += 1
            if latencies is not None:
                latencies.append(clock() - started)

    def _segments(self, lengths: Sequence[int], version: int, loop: SchedulerLoop) -> list[Segment]:
        rows = [Row(tokens=np.empty(length, np.int32), weights=np.empty(0, np.float32)) for length in lengths]
        lease = Lease(job_id=self.job_id, epoch=1, device_id=f"device of {self.job_id}")
        return [
            Segment(lease=lease, version=version, rows=part, loss_denominator=1.0)
            for part in loop.parts(rows)
        ]
