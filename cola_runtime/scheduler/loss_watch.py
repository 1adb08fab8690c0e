"""Ends a job whose training makes no sense any more, before it spends more of its tenant's share."""

from __future__ import annotations

from cola_runtime.jobs.store import JobStore
from cola_runtime.jobs.watchdog import diverged, losses_needed, not_finite
from cola_runtime.scheduler.patience import until_available
from cola_runtime.spec import WatchdogSpec

_LOWER_RATE = "Lower the learning rate or set max_grad_norm; the last checkpoint is kept."
REMEDIES = {  # of what would be the same if it were tried again
    "NON_FINITE_GRADIENT": _LOWER_RATE,
    "NON_FINITE_ADAPTER": _LOWER_RATE,
    "UPDATE_TOO_LARGE": _LOWER_RATE,
    "LOSS_NOT_FINITE": _LOWER_RATE,
    "LOSS_DIVERGED": _LOWER_RATE,
    "TAPS_TOO_LARGE": "The last checkpoint is kept.",
    "OUT_OF_MEMORY": "A row alone does not fit the base model's memory: set max_length, and submit again.",
}


class Diverged(Exception):
    """Going on makes no sense. `reason` is one of REMEDIES."""

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
