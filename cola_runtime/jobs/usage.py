"""What tenants have used, as sums over their jobs: there is no second book that could differ."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Cast, Connection, Select, cast, func, select

from cola_runtime.jobs import schema
from cola_runtime.jobs.records import TenantLoad, TenantTerms, Usage
from cola_runtime.jobs.state import JobState

_jobs = schema.jobs
_tenants = schema.tenants
_terms = schema.tenant_terms


def read_usage(connection: Connection, *, tenant_id: str | None = None) -> list[Usage]:
    """Of every tenant, or of one, by name."""
    query = _query() if tenant_id is None else _query().where(_tenants.c.tenant_id == tenant_id)
    return [Usage(**row) for row in connection.execute(query).mappings()]


def read_loads(connection: Connection, base_model: str) -> list[TenantLoad]:
    """Of the tenants that have jobs of this base model queued or running."""
    weight = func.coalesce(_terms.c.weight, TenantTerms().weight)
    query = (
        select(_jobs.c.tenant_id, func.count().label("jobs"), weight.label("weight"))
        .select_from(_jobs.outerjoin(_terms, _terms.c.tenant_id == _jobs.c.tenant_id))
        .where(_jobs.c.base_model == base_model, _jobs.c.state.in_((JobState.QUEUED, JobState.RUNNING)))
        .group_by(_jobs.c.tenant_id, weight)
    )
    return [TenantLoad(**row) for row in connection.execute(query).mappings()]


def _query() -> Select[Any]:
    summed = ("tokens", "label_tokens", "evaluation_tokens", "repeated_steps", "bytes_up", "bytes_down")
    seconds = ("base_seconds", "device_seconds")
    return (
        select(
            _tenants.c.name.label("tenant"),
            func.count(_jobs.c.job_id).label("jobs"),
            _total("version").label("steps"),
            *(_total(name).label(name) for name in summed),
            *(func.coalesce(func.sum(_jobs.c[name]), 0.0).label(name) for name in seconds),
        )
        .select_from(_tenants.outerjoin(_jobs))
        .group_by(_tenants.c.tenant_id, _tenants.c.name)
        .order_by(_tenants.c.name)
    )


def _total(name: str) -> Cast[int]:
    """An integer, also where the database sums into decimals."""
    return cast(func.coalesce(func.sum(_jobs.c[name]), 0), BigInteger)
