"""Leases, steps and checkpoints: what a device may record of a job, inside a transaction.

Every write compares first and then sets: the lease's epoch must be the job's newest and still open, and a
step must be the next one. So a step is recorded once, whoever repeats or delays the message.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from itertools import zip_longest
from typing import Any

from sqlalchemy import Connection, func, select

from cola_runtime.errors import Conflict, Fenced, InvalidInput
from cola_runtime.jobs import schema
from cola_runtime.jobs.job_rows import end_lease, read_job, update_job
from cola_runtime.jobs.records import CheckpointRecord, JobRecord, StepRecord
from cola_runtime.jobs.state import ACTIVE_STATES, JobState
from cola_runtime.jobs.trail import append_event
from cola_runtime.types import Lease
from cola_runtime.update_chain import START, RecordedLink

_steps = schema.steps
_ADD_STEP = _steps.insert()
_leases = schema.leases
_checkpoints = schema.checkpoints

_MEASURED = ("loss", "learning_rate", "gradient_norm", "base_seconds", "device_seconds")
_SAME_STEP = ("epoch", "loss", "tokens", "label_tokens", "device_id", "chain")


def open_lease(
    connection: Connection, job_id: str, device_ids: Sequence[str], *, replica: str, at: str
) -> Lease:
    """Give the devices the job, with the next epoch; an earlier lease ends. Conflict `JOB_NOT_ACTIVE`."""
    job = read_job(connection, job_id)
    if job.state not in ACTIVE_STATES:
        raise Conflict("JOB_NOT_ACTIVE", f"{job_id} is {job.state}: it takes no lease", actual=job.state)
    end_lease(connection, job_id, at=at)
    first, *further = device_ids
    lease = Lease(job_id=job_id, epoch=job.epoch + 1, device_id=first, further_device_ids=tuple(further))
    connection.execute(
        _leases.insert().values(job_id=job_id, epoch=lease.epoch, device_id=lease.devices, granted_at=at)
    )
    update_job(connection, job_id, epoch=lease.epoch, device_id=lease.devices)
    train = "devices {} train" if further else "device {} trains"
    message = f"{train.format(lease.devices)} the job from version {job.version}"
    data: dict[str, Any] = {"epoch": lease.epoch, "device_id": lease.devices, "version": job.version}
    if replica:
        message += f", beside base model replica {replica}"
        data["replica"] = replica
    if further:
        data["device_ids"] = list(device_ids)
    append_event(connection, job_id, at=at, kind="lease.granted", message=message, data=data)
    return lease


def insert_step(connection: Connection, step: StepRecord, *, at: str) -> JobRecord:
    """Record the next step and add it to the job's totals; the same step again changes nothing.

    Raises Fenced (another lease), Conflict `JOB_NOT_RUNNING`, `STEP_REUSED` (recorded with other numbers)
    or `STEP_OUT_OF_ORDER`, InvalidInput `STEP_NOT_FINITE`.
    """
    job = current_job(connection, step.job_id, step.epoch)
    if job.state is not JobState.RUNNING:
        raise Conflict("JOB_NOT_RUNNING", f"{job.job_id} is {job.state}: it takes no step", actual=job.state)
    _check_finite(step)
    if step.step <= job.version:
        _check_repeated(connection, step)
        return job
    if step.step != job.version + 1:
        raise Conflict(
            "STEP_OUT_OF_ORDER", "steps are recorded in order", limit=job.version + 1, actual=step.step
        )
    step = replace(step, applied_at=step.applied_at or at)
    connection.execute(_ADD_STEP, asdict(step))
    changes = {"version": step.step, "last_loss": step.loss, **_grown(job, step)}
    update_job(connection, job.job_id, **changes)
    _append_step(connection, step, job.total_steps, at=at)
    return replace(job, **changes)


def rewind_job(connection: Connection, lease: Lease, version: int, *, at: str) -> JobRecord:
    """Go back to `version`: later steps, evaluations and checkpoints leave the record; they are made again.

    Version, last loss and token totals are those of the remaining steps; bytes and seconds stay, they were
    spent. Raises Fenced, Conflict `REWIND_AHEAD` above the job's version.
    """
    job = current_job(connection, lease.job_id, lease.epoch)
    if not 0 <= version <= job.version:
        raise Conflict("REWIND_AHEAD", "a rewind goes back only", limit=job.version, actual=version)
    if version == job.version:
        return job
    _delete_above(connection, job.job_id, version)
    totals = _totals(connection, job.job_id, version)
    repeated = job.repeated_steps + job.version - version
    update_job(connection, job.job_id, version=version, repeated_steps=repeated, **totals)
    message = f"back from version {job.version} to {version}: {job.version - version} steps run again"
    data = {"from": job.version, "to": version, "epoch": lease.epoch}
    append_event(
        connection, job.job_id, at=at, kind="job.rewound", message=message, data=data, level="warning"
    )
    return read_job(connection, job.job_id)


def insert_checkpoint(connection: Connection, checkpoint: CheckpointRecord, *, at: str) -> None:
    """Make a stored checkpoint visible; the same again changes nothing.

    Raises Fenced (also: by a device that was put out meanwhile), Conflict `CHECKPOINT_AHEAD` (its last step
    is not recorded) or `CHECKPOINT_EXISTS`.
    """
    job = current_job(connection, checkpoint.job_id, checkpoint.epoch)
    _check_holders(connection, job)
    if checkpoint.version > job.version:
        raise Conflict(
            "CHECKPOINT_AHEAD", "record its steps first", limit=job.version, actual=checkpoint.version
        )
    earlier = _checkpoint_at(connection, checkpoint.job_id, checkpoint.version)
    if earlier is not None:
        if earlier.sha256 != checkpoint.sha256:
            raise Conflict("CHECKPOINT_EXISTS", f"version {checkpoint.version} has another checkpoint")
        return
    checkpoint = replace(checkpoint, created_at=checkpoint.created_at or at)
    connection.execute(_checkpoints.insert().values(**asdict(checkpoint)))
    message = f"checkpoint of version {checkpoint.version}: {checkpoint.bytes} bytes"
    data = {"version": checkpoint.version, "bytes": checkpoint.bytes, "sha256": checkpoint.sha256}
    append_event(connection, job.job_id, at=at, kind="checkpoint.made", message=message, data=data)


def read_steps(connection: Connection, job_id: str, *, after: int, limit: int) -> list[StepRecord]:
    """Steps above `after`, in order."""
    query = select(_steps).where(_steps.c.job_id == job_id, _steps.c.step > min(after, schema.MOST_STEP))
    query = query.order_by(_steps.c.step)
    return [StepRecord(**row) for row in connection.execute(query.limit(limit)).mappings()]


def read_links(connection: Connection, job_id: str, version: int) -> tuple[RecordedLink, ...]:
    """Of the version in the update chain, by shard; none of version 0 and of older releases' steps."""
    version = min(version, schema.MOST_STEP)  # a device may name a greater one
    query = select(_steps.c.step, _steps.c.epoch, _steps.c.chain).where(
        _steps.c.job_id == job_id, _steps.c.step.in_((version - 1, version))
    )
    found = {row.step: row for row in connection.execute(query)}
    if version not in found:
        return ()
    digests = found[version].chain.split()
    before = found[version - 1].chain.split() if version - 1 in found else []
    return tuple(
        RecordedLink(
            job_id=job_id,
            epoch=found[version].epoch,
            version=version,
            previous=bytes.fromhex(previous) or START,
            digest=bytes.fromhex(digest),
        )
        for digest, previous in zip_longest(digests, before[: len(digests)], fillvalue="")
    )


def read_checkpoints(connection: Connection, job_id: str) -> list[CheckpointRecord]:
    """All that are visible, by version."""
    query = select(_checkpoints).where(_checkpoints.c.job_id == job_id).order_by(_checkpoints.c.version)
    return [CheckpointRecord(**row) for row in connection.execute(query).mappings()]


def delete_checkpoints(connection: Connection, job_id: str, versions: Collection[int], *, at: str) -> None:
    """The checkpoints of these versions are kept no longer."""
    of_job = _checkpoints.c.job_id == job_id
    connection.execute(_checkpoints.delete().where(of_job, _checkpoints.c.version.in_(versions)))
    message = f"checkpoints no longer kept: versions {', '.join(map(str, versions))}"
    data = {"versions": list(versions)}
    append_event(connection, job_id, at=at, kind="checkpoint.retired", message=message, data=data)


def read_storage_keys(connection: Connection) -> set[str]:
    """Of every dataset and checkpoint."""
    columns = (schema.jobs.c.training_key, schema.jobs.c.evaluation_key, _checkpoints.c.storage_key)
    return {key for column in columns for (key,) in connection.execute(select(column)) if key is not None}


def newest_checkpoint(connection: Connection, job_id: str) -> CheckpointRecord | None:
    query = select(_checkpoints).where(_checkpoints.c.job_id == job_id)
    row = connection.execute(query.order_by(_checkpoints.c.version.desc()).limit(1)).mappings().first()
    return None if row is None else CheckpointRecord(**row)


def current_job(connection: Connection, job_id: str, epoch: int) -> JobRecord:
    """The job, if `epoch` is its newest lease and still open."""
    job = read_job(connection, job_id)
    if epoch != job.epoch:
        raise Fenced(
            "FENCED", f"{job_id} is leased anew", limit=f"epoch {job.epoch}", actual=f"epoch {epoch}"
        )
    if job.device_id is None:
        raise Fenced("FENCED", f"{job_id} is {job.state}: lease {epoch} has ended", actual=f"epoch {epoch}")
    return job


def _check_holders(connection: Connection, job: JobRecord) -> None:
    names = (job.device_id or "").split(", ")
    quarantines = schema.quarantines
    query = select(quarantines.c.device_id).where(quarantines.c.device_id.in_(names))
    if connection.execute(query).first() is not None:
        raise Fenced("FENCED", f"a device of lease {job.epoch} is in quarantine", actual=f"epoch {job.epoch}")


def _check_finite(step: StepRecord) -> None:
    for name in _MEASURED:
        if not math.isfinite(getattr(step, name)):
            raise InvalidInput("STEP_NOT_FINITE", f"{name} of step {step.step} is {getattr(step, name)}")


def _check_repeated(connection: Connection, step: StepRecord) -> None:
    query = select(_steps).where(_steps.c.job_id == step.job_id, _steps.c.step == step.step)
    row = connection.execute(query).mappings().first()
    if row is None:
        raise Conflict("STEP_OUT_OF_ORDER", f"{step.step} is not a step: they count from 1", actual=step.step)
    if any(row[name] != getattr(step, name) for name in _SAME_STEP):
        raise Conflict("STEP_REUSED", f"step {step.step} is recorded with other numbers", actual=step.step)


def _grown(job: JobRecord, step: StepRecord) -> dict[str, Any]:
    names = ("tokens", "label_tokens", "bytes_up", "bytes_down", "base_seconds", "device_seconds")
    return {name: getattr(job, name) + getattr(step, name) for name in names}


def _append_step(connection: Connection, step: StepRecord, total_steps: int, *, at: str) -> None:
    message = f"step {step.step} of {total_steps}: loss {step.loss:.4f}"
    names = ("step", "epoch", "loss", "learning_rate", "gradient_norm", "tokens", "device_id")
    data = {name: getattr(step, name) for name in names}
    append_event(connection, step.job_id, at=at, kind="step.applied", message=message, data=data)


def _delete_above(connection: Connection, job_id: str, version: int) -> None:
    for table in (_steps, schema.evaluations):
        connection.execute(table.delete().where(table.c.job_id == job_id, table.c.step > version))
    later = (_checkpoints.c.job_id == job_id, _checkpoints.c.version > version)
    connection.execute(_checkpoints.delete().where(*later))


def _totals(connection: Connection, job_id: str, version: int) -> dict[str, Any]:
    of_job = _steps.c.job_id == job_id
    sums = (func.coalesce(func.sum(column), 0) for column in (_steps.c.tokens, _steps.c.label_tokens))
    tokens, label_tokens = connection.execute(select(*sums).where(of_job)).one()
    evaluations = schema.evaluations
    held_out = select(func.coalesce(func.sum(evaluations.c.tokens), 0)).where(evaluations.c.job_id == job_id)
    last = select(_steps.c.loss).where(of_job, _steps.c.step == version)
    last_loss = connection.execute(last).scalar_one_or_none()
    return {
        "tokens": tokens,
        "label_tokens": label_tokens,
        "last_loss": last_loss,
        "evaluation_tokens": int(connection.execute(held_out).scalar_one()),  # PostgreSQL sums into decimals
    }


def _checkpoint_at(connection: Connection, job_id: str, version: int) -> CheckpointRecord | None:
    query = select(_checkpoints).where(_checkpoints.c.job_id == job_id, _checkpoints.c.version == version)
    row = connection.execute(query).mappings().first()
    return None if row is None else CheckpointRecord(**row)
