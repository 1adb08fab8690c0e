"""Devices that are put out, and what they have made, as functions of a connection inside a transaction."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sqlalchemy import Connection, select

from cola_runtime.errors import NotFound, Unauthenticated
from cola_runtime.jobs import schema
from cola_runtime.jobs.progress import delete_checkpoints, read_checkpoints
from cola_runtime.jobs.records import CheckpointRecord
from cola_runtime.jobs.state import TERMINAL_STATES
from cola_runtime.jobs.trail import append_event

_quarantines = schema.quarantines
_leases = schema.leases
_jobs = schema.jobs
_checkpoints = schema.checkpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """Why a device is let in no more, until an operator reinstates it."""

    device_id: str
    reason: str  # stable, of reasons.py
    message: str
    quarantined_at: str


def insert_quarantine(connection: Connection, new: Quarantine) -> bool:
    """False if the device is put out already: the first reason stays."""
    if find_quarantine(connection, new.device_id) is not None:
        return False
    connection.execute(_quarantines.insert().values(**asdict(new)))
    return True


def find_quarantine(connection: Connection, device_id: str) -> Quarantine | None:
    row = connection.execute(select(_quarantines).where(_quarantines.c.device_id == device_id)).mappings()
    found = row.one_or_none()
    return None if found is None else Quarantine(**found)


def read_quarantines(connection: Connection) -> list[Quarantine]:
    rows = connection.execute(select(_quarantines).order_by(_quarantines.c.quarantined_at))
    return [Quarantine(**row) for row in rows.mappings()]


def end_quarantine(connection: Connection, device_id: str) -> Quarantine:
    """Raises NotFound `DEVICE_NOT_QUARANTINED`."""
    found = find_quarantine(connection, device_id)
    if found is None:
        raise NotFound("DEVICE_NOT_QUARANTINED", f"no device {device_id!r} is in quarantine")
    connection.execute(_quarantines.delete().where(_quarantines.c.device_id == device_id))
    return found


def check_not_quarantined(found: Quarantine | None) -> None:
    """Of a device whose quarantine is `found`. Raises Unauthenticated `DEVICE_QUARANTINED`."""
    if found is not None:
        raise Unauthenticated(
            "DEVICE_QUARANTINED",
            f"this device is in quarantine since {found.quarantined_at}: {found.reason}",
            remedy="An operator can look at it and let it in again: `cola devices reinstate`.",
        )


def distrust_device(connection: Connection, device_id: str, *, at: str) -> list[str]:
    """Take back what the device has made; the jobs of which something has gone.

    Of a job that has not ended, the first of its checkpoints that is the device's and was never checked goes,
    and every later one, which follows from it. A job that has ended stays as it is: an event says who trained
    it.
    """
    changed = []
    for job_id, state in _trained_by(connection, device_id):
        if state in TERMINAL_STATES:
            message = f"device {device_id}, which trained a part of this job, was found to be wrong"
            data = {"device_id": device_id}
            append_event(
                connection,
                job_id,
                at=at,
                kind="device.quarantined",
                message=message,
                data=data,
                level="warning",
            )
        elif gone := _doubtful(connection, job_id, device_id):
            delete_checkpoints(connection, job_id, [each.version for each in gone], at=at)
            changed.append(job_id)
    return changed


def mark_checked(connection: Connection, job_id: str, version: int, *, at: str) -> None:
    of_version = (_checkpoints.c.job_id == job_id, _checkpoints.c.version == version)
    connection.execute(_checkpoints.update().where(*of_version).values(checked_at=at))


def _trained_by(connection: Connection, device_id: str) -> list[tuple[str, str]]:
    query = select(_leases.c.job_id, _jobs.c.state, _leases.c.device_id).join(
        _jobs, _jobs.c.job_id == _leases.c.job_id
    )
    rows = connection.execute(query.where(_leases.c.device_id.contains(device_id, autoescape=True)))
    return list(dict.fromkeys((row.job_id, row.state) for row in rows if _names(row.device_id, device_id)))


def _doubtful(connection: Connection, job_id: str, device_id: str) -> list[CheckpointRecord]:
    rows = connection.execute(select(_leases.c.epoch, _leases.c.device_id).where(_leases.c.job_id == job_id))
    own = {row.epoch for row in rows if _names(row.device_id, device_id)}
    found = read_checkpoints(connection, job_id)
    first = next((i for i, each in enumerate(found) if each.epoch in own and each.checked_at is None), None)
    return [] if first is None else found[first:]


def _names(devices: str, device_id: str) -> bool:
    """`Lease.devices` names it. Of very many devices only the first is named: then each may be meant."""
    return device_id in devices.split(", ") or devices.endswith(" more")
