"""Checkpoints that their tenant has kept for good, as functions of a connection inside a transaction."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import Connection, func, select

from cola_runtime.errors import Conflict, NotFound, QuotaExceeded
from cola_runtime.jobs import schema
from cola_runtime.jobs.job_rows import read_job
from cola_runtime.jobs.progress import read_checkpoints
from cola_runtime.jobs.records import CheckpointRecord
from cola_runtime.jobs.terms import read_terms
from cola_runtime.jobs.trail import append_event

_checkpoints = schema.checkpoints
_jobs = schema.jobs


def pin_checkpoint(connection: Connection, job_id: str, version: int | None, *, at: str) -> CheckpointRecord:
    """None is the newest. Raises as `CheckpointBook.pin`."""
    checkpoint = _find(connection, job_id, version)
    if checkpoint.pinned:
        return checkpoint
    _check_quota(connection, checkpoint)
    return _set(connection, checkpoint, at, at=at)


def unpin_checkpoint(connection: Connection, job_id: str, version: int, *, at: str) -> CheckpointRecord:
    checkpoint = _find(connection, job_id, version)
    return _set(connection, checkpoint, None, at=at) if checkpoint.pinned else checkpoint


def _find(connection: Connection, job_id: str, version: int | None) -> CheckpointRecord:
    found = read_checkpoints(connection, job_id)
    if not found:
        raise Conflict(
            "ADAPTER_NOT_READY",
            "the job has no checkpoint yet",
            where=job_id,
            remedy="Wait for its first checkpoint: `cola jobs checkpoints`.",
        )
    for checkpoint in reversed(found):
        if version in (None, checkpoint.version):
            return checkpoint
    raise NotFound(
        "CHECKPOINT_UNKNOWN",
        f"the job has no checkpoint of version {version}",
        where=job_id,
        remedy="`cola jobs checkpoints` lists them.",
    )


def _check_quota(connection: Connection, new: CheckpointRecord) -> None:
    tenant_id = read_job(connection, new.job_id).tenant_id
    cap = read_terms(connection, tenant_id).pinned_bytes
    if cap is None:
        return
    query = select(func.coalesce(func.sum(_checkpoints.c.bytes), 0)).join(
        _jobs, _jobs.c.job_id == _checkpoints.c.job_id
    )
    pinned = query.where(_jobs.c.tenant_id == tenant_id, _checkpoints.c.pinned_at.is_not(None))
    together = int(connection.execute(pinned).scalar_one()) + new.bytes
    if together > cap:
        raise QuotaExceeded(
            "QUOTA_PINNED",
            "the tenant's pinned checkpoints would be larger than they may be together",
            where=new.job_id,
            limit=f"{cap} bytes",
            actual=f"{together} bytes",
            remedy="Unpin another one: `cola jobs unpin`; or ask the operator for more.",
        )


def _set(
    connection: Connection, checkpoint: CheckpointRecord, pinned_at: str | None, *, at: str
) -> CheckpointRecord:
    job_id, version = checkpoint.job_id, checkpoint.version
    of_version = (_checkpoints.c.job_id == job_id, _checkpoints.c.version == version)
    connection.execute(_checkpoints.update().where(*of_version).values(pinned_at=pinned_at))
    done = "unpinned" if pinned_at is None else "pinned"
    message = f"the checkpoint of version {version} is {done}"
    append_event(
        connection, job_id, at=at, kind=f"checkpoint.{done}", message=message, data={"version": version}
    )
    return replace(checkpoint, pinned_at=pinned_at)
