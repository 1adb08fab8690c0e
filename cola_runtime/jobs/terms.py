"""Tenants' weights and caps, as functions of a connection inside a transaction."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any

from sqlalchemy import Connection, func, select

from cola_runtime.errors import InvalidInput
from cola_runtime.jobs import schema
from cola_runtime.jobs.records import TenantTerms, TermChanges
from cola_runtime.jobs.state import TERMINAL_STATES

MOST_WEIGHT = 1000.0
MOST_CAP = 2**53

_terms = schema.tenant_terms
_jobs = schema.jobs


def read_terms(connection: Connection, tenant_id: str) -> TenantTerms:
    """The defaults for a tenant that nobody set any for."""
    row = connection.execute(select(_terms).where(_terms.c.tenant_id == tenant_id)).mappings().one_or_none()
    if row is None:
        return TenantTerms()
    return TenantTerms(**{field.name: row[field.name] for field in fields(TenantTerms)})


def change_terms(connection: Connection, tenant_id: str, changes: TermChanges) -> TenantTerms:
    """What is None stays; a cap of 0 is no cap any more. Raises InvalidInput `TERMS_INVALID`."""
    given = {name: value for name, value in asdict(changes).items() if value is not None}
    for name, value in given.items():
        most = MOST_WEIGHT if name == "weight" else MOST_CAP
        if not 0 <= value <= most or (name == "weight" and value < 1 / MOST_WEIGHT):
            raise InvalidInput(
                "TERMS_INVALID",
                f"{name} {value} is out of range",
                where=name,
                limit=f"{1 / MOST_WEIGHT} to {MOST_WEIGHT}" if name == "weight" else f"0 (none) to {most}",
                actual=value,
                remedy="Nothing was changed.",
            )
    values: dict[str, Any] = {name: value or None for name, value in given.items()}
    terms = replace(read_terms(connection, tenant_id), **values)
    connection.execute(_terms.delete().where(_terms.c.tenant_id == tenant_id))
    connection.execute(_terms.insert().values(tenant_id=tenant_id, **asdict(terms)))
    return terms


def steps_of(connection: Connection, tenant_id: str) -> int:
    """Steps taken by the tenant's jobs, and to come of those that have not ended."""
    ended = _jobs.c.state.in_(TERMINAL_STATES)
    of_tenant = select(func.coalesce(func.sum(_jobs.c.version), 0)).where(_jobs.c.tenant_id == tenant_id)
    to_come = select(func.coalesce(func.sum(_jobs.c.total_steps - _jobs.c.version), 0)).where(
        _jobs.c.tenant_id == tenant_id, ~ended
    )
    return int(connection.execute(of_tenant).scalar_one()) + int(connection.execute(to_come).scalar_one())
