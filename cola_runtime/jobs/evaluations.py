"""What held-out rows gave at which version, inside a transaction. A version is evaluated once."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

from sqlalchemy import Connection, select

from cola_runtime.errors import Conflict, InvalidInput
from cola_runtime.jobs import schema
from cola_runtime.jobs.job_rows import update_job
from cola_runtime.jobs.progress import current_job
from cola_runtime.jobs.records import EvaluationRecord
from cola_runtime.jobs.trail import append_event

_evaluations = schema.evaluations


def insert_evaluation(connection: Connection, evaluation: EvaluationRecord, *, at: str) -> EvaluationRecord:
    """Record the evaluation of the job's version, with its event, and add what it cost to the job's totals;
    the same version again changes nothing.

    Raises Fenced, InvalidInput `METRIC_NOT_FINITE`, Conflict `EVALUATION_OUT_OF_ORDER` for a version that is
    not the job's.
    """
    job = current_job(connection, evaluation.job_id, evaluation.epoch)
    if not all(map(math.isfinite, evaluation.metrics.values())):
        raise InvalidInput(
            "METRIC_NOT_FINITE",
            f"held-out rows gave {dict(evaluation.metrics)} at step {evaluation.step}",
            remedy="Lower the learning rate or set max_grad_norm; earlier checkpoints are kept.",
        )
    earlier = read_evaluations(connection, job.job_id, after=evaluation.step - 1, limit=1)
    if earlier and earlier[0].step == evaluation.step:
        return earlier[0]
    if evaluation.step != job.version:
        raise Conflict(
            "EVALUATION_OUT_OF_ORDER",
            "the job's own version is what is evaluated",
            limit=job.version,
            actual=evaluation.step,
        )
    evaluation = replace(evaluation, created_at=evaluation.created_at or at)
    connection.execute(_evaluations.insert().values(**asdict(evaluation)))
    update_job(
        connection,
        job.job_id,
        evaluation_tokens=job.evaluation_tokens + evaluation.tokens,
        base_seconds=job.base_seconds + evaluation.base_seconds,
    )
    _append_evaluation(connection, evaluation, at=at)
    return evaluation


def read_evaluations(
    connection: Connection, job_id: str, *, after: int, limit: int | None
) -> list[EvaluationRecord]:
    """Those of steps above `after`, in order."""
    later = _evaluations.c.step > min(after, schema.MOST_STEP)
    query = select(_evaluations).where(_evaluations.c.job_id == job_id, later)
    rows = connection.execute(query.order_by(_evaluations.c.step).limit(limit)).mappings()
    return [EvaluationRecord(**row) for row in rows]


def find_best(connection: Connection, job_id: str) -> EvaluationRecord | None:
    """The newest one that improved; None before the first."""
    query = select(_evaluations).where(_evaluations.c.job_id == job_id, _evaluations.c.improved)
    row = connection.execute(query.order_by(_evaluations.c.step.desc()).limit(1)).mappings().first()
    return None if row is None else EvaluationRecord(**row)


def _append_evaluation(connection: Connection, evaluation: EvaluationRecord, *, at: str) -> None:
    values = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.metrics.items())
    best = ", the best so far" if evaluation.improved else ""
    names = ("step", "epoch", "primary", "greater_is_better", "improved")
    data = {**{name: getattr(evaluation, name) for name in names}, "metrics": dict(evaluation.metrics)}
    message = f"held-out rows at step {evaluation.step}: {values}{best}"
    append_event(connection, evaluation.job_id, at=at, kind="evaluation.done", message=message, data=data)
