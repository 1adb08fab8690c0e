"""The event trail: one row per thing that happened to a job, in the transaction that made it happen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, RowMapping, func, select

from cola_runtime.jobs import schema
from cola_runtime.jobs.records import EventRecord

_events = schema.events


def append_event(
    connection: Connection,
    job_id: str,
    *,
    at: str,
    kind: str,
    message: str,
    data: Mapping[str, Any] | None = None,
    level: str = "info",
) -> EventRecord:
    """Add one event to a job's history. `data` must be plain JSON values."""
    values = {"job_id": job_id, "created_at": at, "kind": kind, "level": level, "message": message}
    text = json.dumps(dict(data or {}), allow_nan=False)
    event_id = connection.execute(
        _events.insert().values(**values, data_json=text).returning(_events.c.id)
    ).scalar_one()
    return EventRecord(id=event_id, **values, data=dict(data or {}))


def read_events(connection: Connection, job_id: str, *, after: int, limit: int) -> list[EventRecord]:
    """Events above id `after`, oldest first."""
    rows = connection.execute(
        select(_events)
        .where(_events.c.job_id == job_id, _events.c.id > min(after, schema.MOST_ID))
        .order_by(_events.c.id)
        .limit(limit)
    )
    return [_event(row) for row in rows.mappings()]


def last_event_id(connection: Connection, job_id: str) -> int:
    """The newest event's id, 0 without one."""
    query = select(func.coalesce(func.max(_events.c.id), 0)).where(_events.c.job_id == job_id)
    return int(connection.execute(query).scalar_one())


def _event(row: RowMapping) -> EventRecord:
    fields = dict(row)
    return EventRecord(data=json.loads(fields.pop("data_json")), **fields)
