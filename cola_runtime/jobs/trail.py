"""The event trail: one row per thing that happened to a job, in the transaction that made it happen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, RowMapping, select

from cola_runtime.jobs import schema
from cola_runtime.jobs.records import EventRecord

_events = schema.events
_APPEND = _events.insert().returning(_events.c.id)


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
    event_id = connection.execute(_APPEND, {**values, "data_json": text}).scalar_one()
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


def _event(row: RowMapping) -> EventRecord:
    fields = dict(row)
    return EventRecord(data=json.loads(fields.pop("data_json")), **fields)
