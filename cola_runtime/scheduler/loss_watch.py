"""Ends a job whose training makes no sense any more, before it spends more of its tenant's share."""

from __future__ import annotations

from cola_runtime.jobs.store import JobStore
from cola_runtime.jobs.watchdog import diverged, losses_needed, not_finite
from cola_runtime.scheduler.patience import until_available
from cola_runtime.spec import WatchdogSpec

FATAL = frozenset({  # what would be the same if it were tried again
    "NON_FINITE_GRADIENT",
    "NON_FINITE_ADAPTER",
    "UPDATE_TOO_LARGE",
    "LOSS_NOT_FINITE",
    "LOSS_DIVERGED",
    "TAPS_TOO_LARGE",
    "OUT_OF_MEMORY",
})  # fmt: skip


class Diverged(Exception):
    """Going on makes no sense. `reason` is one of FATAL."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


class LossWatch:
    """One job's watchdog. What is recorded decides, so that a job taken up again is judged the same."""

    def __init__(self, job_id: str, spec: WatchdogSpec, store: JobStore) -> None:
        self._job_id, self._spec, self._store = job_id, spec, store

    def check(self, step: int, loss: float) -> None:
        """Raise Diverged for a loss that cannot be recorded."""
        if wrong := not_finite(step, loss):
            raise Diverged("LOSS_NOT_FINITE", wrong)

    async def check_recorded(self, version: int) -> None:
        """Raise Diverged when the losses up to `version` have exploded."""
        first, latest = losses_needed(self._spec, version)
        if len(latest) < self._spec.patience:
            return
        if wrong := diverged(self._spec, await self._losses(first), await self._losses(latest)):
            raise Diverged("LOSS_DIVERGED", wrong)

    async def _losses(self, steps: range) -> list[float]:
        after, count = steps.start - 1, len(steps)
        found = await until_available(lambda: self._store.steps(self._job_id, after=after, limit=count))
        return [step.loss for step in found]
