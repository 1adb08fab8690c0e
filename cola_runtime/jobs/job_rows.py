"""Jobs as they stand: creating, reading, finding and moving between states, inside a transaction."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    ScalarSelect,
    Select,
    bindparam,
    func,
    select,
    tuple_,
)

from cola_runtime.clock import rfc3339
from cola_runtime.errors import Conflict, InvalidInput, NotFound
from cola_runtime.jobs import schema
from cola_runtime.jobs.records import JobRecord, NewJob
from cola_runtime.jobs.state import INITIAL_STATE, TERMINAL_STATES, JobState, Trigger, next_state
from cola_runtime.jobs.trail import append_event

MAX_LISTED_JOBS = 1000

_jobs = schema.jobs
_leases = schema.leases
_evaluations = schema.evaluations
_UPDATE_JOB = _jobs.update().where(_jobs.c.job_id == bindparam("of_job"))


def insert_job(connection: Connection, new: NewJob, *, at: str) -> JobRecord:
    """The new job, queued; or the job that the same idempotency key made of the same request before.

    Raises Conflict `IDEMPOTENCY_CONFLICT` if that request was another one.
    """
    earlier = _made_by_key(connection, new)
    if earlier is not None:
        return earlier
    values = asdict(new)
    values["deadline_at"] = _later(at, values.pop("deadline_seconds"))
    connection.execute(_jobs.insert().values(**values, state=INITIAL_STATE, created_at=at))
    message = f"job {new.name!r} is queued: {new.total_steps} steps on {new.base_model}"
    data = {"to": INITIAL_STATE, "total_steps": new.total_steps}
    append_event(connection, new.job_id, at=at, kind="job.queued", message=message, data=data)
    return read_job(connection, new.job_id)


def miss_deadline(connection: Connection, job_id: str, *, at: str) -> JobRecord | None:
    """Note, once, that the job had not ended by its deadline; None if it had, or has none.

    The job goes on: a missed deadline is an event.
    """
    job = read_job(connection, job_id)
    if job.ended or job.deadline_at is None or job.deadline_missed_at is not None:
        return None
    update_job(connection, job_id, deadline_missed_at=at)
    message = f"its deadline, {job.deadline_at}, passed at step {job.version} of {job.total_steps}"
    data = {"deadline_at": job.deadline_at, "version": job.version, "total_steps": job.total_steps}
    kind = "job.deadline_missed"
    append_event(connection, job_id, at=at, kind=kind, message=message, data=data, level="warning")
    return read_job(connection, job_id)


def read_job(connection: Connection, job_id: str, *, tenant_id: str | None = None) -> JobRecord:
    """Raises NotFound `JOB_UNKNOWN`, also when the job is another tenant's."""
    query = _one_job() if tenant_id is None else _one_job().where(_jobs.c.tenant_id == tenant_id)
    row = connection.execute(query, {"of_job": job_id}).mappings().one_or_none()
    if row is None:
        raise _unknown(job_id)
    return _record(row)


def has_ended(connection: Connection, job_id: str) -> bool:
    state = connection.execute(select(_jobs.c.state).where(_jobs.c.job_id == job_id)).scalar_one()
    return JobState(state) in TERMINAL_STATES


def find_job(connection: Connection, tenant_id: str, ref: str) -> JobRecord:
    """The tenant's job with this id, else with this name, else whose id starts so.

    Raises NotFound `JOB_UNKNOWN`; Conflict `REFERENCE_AMBIGUOUS` if a name or prefix fits several.
    """
    if not ref or "\0" in ref:  # every id starts with nothing; PostgreSQL takes no NUL
        raise _unknown(ref)
    matches = (_jobs.c.job_id == ref, _jobs.c.name == ref, _jobs.c.job_id.startswith(ref, autoescape=True))
    for match in matches:
        found = connection.execute(_query(tenant_id).where(match).limit(6)).mappings().all()
        if len(found) > 1:
            raise _ambiguous(ref, [row["job_id"] for row in found])
        if found:
            return _record(found[0])
    raise _unknown(ref)


def list_jobs(
    connection: Connection,
    *,
    tenant_id: str | None,
    states: Collection[JobState] | None,
    limit: int,
    after: str | None,
) -> list[JobRecord]:
    """Newest first, those after the job `after`. Raises InvalidInput `CURSOR_INVALID` if there is none."""
    order = tuple_(_jobs.c.created_at, _jobs.c.job_id)
    query = _query(tenant_id).order_by(_jobs.c.created_at.desc(), _jobs.c.job_id.desc())
    if states is not None:
        query = query.where(_jobs.c.state.in_(states))
    if after is not None:
        query = query.where(order < tuple_(*_position(connection, after, tenant_id)))
    rows = connection.execute(query.limit(max(1, min(limit, MAX_LISTED_JOBS))))
    return [_record(row) for row in rows.mappings()]


def count_active(connection: Connection, tenant_id: str, *, but_key: str) -> int | None:
    """Of the tenant's jobs, those that have not ended; None where the idempotency key made one already."""
    of_tenant = _jobs.c.tenant_id == tenant_id
    made = select(_jobs.c.job_id).where(of_tenant, _jobs.c.idempotency_key == but_key)
    if but_key and connection.execute(made).first() is not None:
        return None
    query = select(func.count()).select_from(_jobs).where(of_tenant, _jobs.c.state.not_in(TERMINAL_STATES))
    return int(connection.execute(query).scalar_one())


def move_job(
    connection: Connection,
    job_id: str,
    trigger: Trigger,
    *,
    at: str,
    message: str = "",
    failure_reason: str | None = None,
    failure_message: str | None = None,
) -> JobRecord:
    """Enter the state that `trigger` leads to, and write the event. Anything but running ends the lease.

    Raises Conflict `TRANSITION_ILLEGAL`.
    """
    job = read_job(connection, job_id)
    state = next_state(job.state, trigger)
    changes = _changes(job, state, at)
    if state is JobState.FAILED:
        changes |= {"failure_reason": failure_reason or "JOB_FAILED", "failure_message": failure_message}
    if state is not JobState.RUNNING:
        end_lease(connection, job_id, at=at)
    update_job(connection, job_id, **changes)
    moved = read_job(connection, job_id)
    _append_transition(connection, moved, job.state, trigger, at=at, message=message)
    return moved


def update_job(connection: Connection, job_id: str, **changes: Any) -> None:
    connection.execute(_UPDATE_JOB, {"of_job": job_id, **changes})


def end_lease(connection: Connection, job_id: str, *, at: str) -> None:
    """Close the job's open lease, if there is one."""
    still_open = (_leases.c.job_id == job_id) & _leases.c.ended_at.is_(None)
    connection.execute(_leases.update().where(still_open).values(ended_at=at))
    update_job(connection, job_id, device_id=None)


def _later(at: str, seconds: float | None) -> str | None:
    return None if seconds is None else rfc3339(datetime.fromisoformat(at) + timedelta(seconds=seconds))


def _changes(job: JobRecord, state: JobState, at: str) -> dict[str, Any]:
    changes: dict[str, Any] = {"state": state}
    if state is JobState.RUNNING and job.started_at is None:
        changes["started_at"] = at
    if state in TERMINAL_STATES:
        changes["finished_at"] = at
    return changes


def _append_transition(
    connection: Connection, job: JobRecord, before: JobState, trigger: Trigger, *, at: str, message: str
) -> None:
    text = message or job.failure_message or f"job {job.name!r} is {job.state} at step {job.version}"
    data = {"from": before, "to": job.state, "trigger": trigger, "version": job.version}
    if job.failure_reason is not None:
        data["reason"] = job.failure_reason
    level = "error" if job.state is JobState.FAILED else "info"
    append_event(connection, job.job_id, at=at, kind=f"job.{job.state}", message=text, data=data, level=level)


def _made_by_key(connection: Connection, new: NewJob) -> JobRecord | None:
    if new.idempotency_key is None:
        return None
    query = _query(new.tenant_id).where(_jobs.c.idempotency_key == new.idempotency_key)
    row = connection.execute(query).mappings().one_or_none()
    if row is None:
        return None
    if row["request_digest"] != new.request_digest:
        raise Conflict(
            "IDEMPOTENCY_CONFLICT",
            f"the idempotency key {new.idempotency_key!r} made {row['job_id']} of another request",
            remedy="Send the same request again, or use a new key.",
        )
    return _record(row)


@cache
def _one_job() -> Select[Any]:
    """Built once, since building it takes as long as running it. Its parameter is `of_job`."""
    return _query(None).where(_jobs.c.job_id == bindparam("of_job"))


def _query(tenant_id: str | None) -> Select[Any]:
    query = select(
        _jobs,
        schema.tenants.c.name.label("tenant_name"),
        _held_out_loss(_evaluations.c.step == 0).label("evaluation_loss_before"),
        _held_out_loss(_evaluations.c.step > 0).label("evaluation_loss_after"),
    ).join(schema.tenants)
    return query if tenant_id is None else query.where(_jobs.c.tenant_id == tenant_id)


def _held_out_loss(which: ColumnElement[bool]) -> ScalarSelect[Any]:
    """Loss of the job's newest evaluation among `which`."""
    of_job = select(_evaluations.c.metrics["loss"].as_float()).where(_evaluations.c.job_id == _jobs.c.job_id)
    return of_job.where(which).order_by(_evaluations.c.step.desc()).limit(1).scalar_subquery()


def _position(connection: Connection, job_id: str, tenant_id: str | None) -> tuple[str, str]:
    try:
        job = read_job(connection, job_id, tenant_id=tenant_id)
    except NotFound as error:
        raise InvalidInput("CURSOR_INVALID", f"there is no job {job_id!r} to continue after") from error
    return job.created_at, job.job_id


def _record(row: RowMapping) -> JobRecord:
    fields = dict(row)
    return JobRecord(state=JobState(fields.pop("state")), **fields)


def _unknown(ref: str) -> NotFound:
    return NotFound("JOB_UNKNOWN", f"there is no job {ref[:200]!r}", remedy="`cola jobs list` shows yours.")


def _ambiguous(ref: str, job_ids: list[str]) -> Conflict:
    shown = ", ".join(job_ids[:5]) + (", ..." if len(job_ids) > 5 else "")
    return Conflict(
        "REFERENCE_AMBIGUOUS", f"{ref[:200]!r} fits several jobs: {shown}", remedy="Give the full job id."
    )
