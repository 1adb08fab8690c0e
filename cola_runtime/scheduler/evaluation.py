"""One job's evaluations on its held-out rows: when they are due, what they say, when enough is enough."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from cola_runtime.job_choices import Metric
from cola_runtime.jobs.records import EvaluationRecord
from cola_runtime.jobs.store import JobStore
from cola_runtime.scheduler.job_data import JobData
from cola_runtime.scheduler.primitives import AdapterPrimitives, LeasedAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyStop:
    """Why a job ends before its last step."""

    step: int
    evaluations: int  # in a row, without improvement
    best: EvaluationRecord

    @property
    def message(self) -> str:
        best = self.best
        return (
            f"stopped early at step {self.step}: {self.evaluations} evaluations without improvement; "
            f"best {best.primary} {best.value:.4f} at step {best.step}"
        )

    @property
    def data(self) -> dict[str, Any]:
        best = self.best
        return {
            "step": self.step,
            "evaluations_without_improvement": self.evaluations,
            "primary": best.primary,
            "best_value": best.value,
            "best_step": best.step,
        }


class Evaluations:
    """What is recorded decides, so that a job which was taken up again ends as one that was not."""

    def __init__(
        self, data: JobData, *, total_steps: int, primitives: AdapterPrimitives, store: JobStore
    ) -> None:
        self._spec = data.spec.evaluation
        self._data = data
        self._total_steps = total_steps
        self._primitives, self._store = primitives, store
        self._done: list[EvaluationRecord] = []

    async def resume(self, job_id: str) -> None:
        """Read what is recorded: after every lease, since a rewind takes evaluations back."""
        self._done = await self._store.evaluations(job_id)

    def due(self, version: int) -> bool:
        """Before the first step, every `every` steps and after the last; never without held-out rows."""
        if not self._data.evaluation:
            return False
        every = self._spec.every
        return version in (0, self._total_steps) or (every is not None and version % every == 0)

    async def run(self, adapter: LeasedAdapter) -> None:
        """Evaluate the adapter's version unless that is recorded; an improvement is kept as a checkpoint."""
        if not self._done or self._done[-1].step < adapter.version:
            self._done.append(await self._evaluate(adapter))
        if self._spec.keep_best and self._done[-1].improved:
            await self._primitives.checkpoint(adapter)

    @property
    def early_stop(self) -> EarlyStop | None:
        """The end of the job, once `patience` evaluations in a row have not improved on the best."""
        patience, best = self._spec.patience, self._best
        if patience is None or best is None:
            return None
        since = sum(each.step > best.step for each in self._done)
        return (
            EarlyStop(step=self._done[-1].step, evaluations=since, best=best) if since >= patience else None
        )

    @property
    def _best(self) -> EvaluationRecord | None:
        return next((each for each in reversed(self._done) if each.improved), None)

    async def _evaluate(self, adapter: LeasedAdapter) -> EvaluationRecord:
        loss = await self._primitives.forward(adapter, self._data.evaluation)
        generated: list[list[int]] = []
        if self._data.prompts is not None:
            generated = await self._primitives.answer(adapter, self._data.prompts)
        metrics = await asyncio.to_thread(self._data.measures, loss.mean, loss.predictions, generated)
        metric, best = self._spec.metric, self._best
        improved = best is None or improves(
            metrics[metric], best.value, metric=metric, min_delta=self._spec.min_delta
        )
        return await self._store.record_evaluation(
            EvaluationRecord(
                job_id=adapter.lease.job_id,
                step=adapter.version,
                epoch=adapter.lease.epoch,
                metrics=metrics,
                primary=metric.value,
                greater_is_better=metric.greater_is_better,
                improved=improved,
                tokens=sum(row.length for row in self._data.evaluation),
                base_seconds=loss.base_seconds,
            )
        )


def improves(value: float, best: float, *, metric: Metric, min_delta: float) -> bool:
    """Better than `best` by more than `min_delta`."""
    gain = value - best if metric.greater_is_better else best - value
    return gain > min_delta
