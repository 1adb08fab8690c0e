"""Spot checks that are to be made, as functions of a connection inside a transaction."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sqlalchemy import Connection, select

from cola_runtime.jobs import schema

_checks = schema.spot_checks


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingCheck:
    """Steps under one lease that a trusted device is to make again."""

    job_id: str
    epoch: int
    first: int  # the version that the first of them left
    last: int  # the version of the checkpoint that they led to
    device_ids: tuple[str, ...]  # of the lease, by shard
    shards: tuple[int, ...]  # which of them are checked
    replica: str  # of the base model, that keeps what it sent for them


def keep_check(connection: Connection, check: PendingCheck) -> None:
    """An interval that has got further takes the place of what there was of it."""
    forget_check(connection, check)
    fields = asdict(check) | {"device_ids": list(check.device_ids), "shards": list(check.shards)}
    connection.execute(_checks.insert().values(**fields))


def forget_check(connection: Connection, check: PendingCheck) -> None:
    """It has been made, or cannot be. A second time changes nothing."""
    of_interval = (_checks.c.job_id == check.job_id, _checks.c.epoch == check.epoch)
    connection.execute(_checks.delete().where(*of_interval, _checks.c.first == check.first))


def read_checks(connection: Connection) -> list[PendingCheck]:
    """All that are to be made, by job and version."""
    order = (_checks.c.job_id, _checks.c.epoch, _checks.c.first)
    rows = connection.execute(select(_checks).order_by(*order)).mappings()
    return [
        PendingCheck(**dict(row) | {"device_ids": tuple(row["device_ids"]), "shards": tuple(row["shards"])})
        for row in rows
    ]
