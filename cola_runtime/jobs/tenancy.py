"""Tenants and their API keys, as functions of a connection inside a transaction."""

from __future__ import annotations

import hmac
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, RowMapping, select

from cola_runtime import ids
from cola_runtime.errors import Conflict, InvalidInput, NotFound
from cola_runtime.jobs import schema
from cola_runtime.jobs.records import ApiKey, Tenant

LAST_USED_RESOLUTION = timedelta(minutes=1)  # a busy key costs one write a minute, not one a call

_tenants = schema.tenants
_keys = schema.api_keys
_key_columns = (
    _keys.c.key_id,
    _keys.c.tenant_id,
    _tenants.c.name.label("tenant_name"),
    _keys.c.scopes,
    _keys.c.created_at,
    _keys.c.last_used_at,
    _keys.c.revoked_at,
    _keys.c.expires_at,
)


def insert_tenant(connection: Connection, name: str, *, at: str) -> Tenant:
    """Raises InvalidInput `TENANT_NAME_INVALID`, Conflict `TENANT_EXISTS`."""
    if not 1 <= len(name) <= 63 or not name.isprintable():
        raise InvalidInput("TENANT_NAME_INVALID", f"tenant name {name!r} needs 1 to 63 printable characters")
    if _tenant_by_name(connection, name) is not None:
        raise Conflict("TENANT_EXISTS", f"there is a tenant {name!r} already", remedy="Choose another name.")
    tenant = Tenant(tenant_id=ids.new_tenant_id(), name=name, created_at=at)
    connection.execute(
        _tenants.insert().values(tenant_id=tenant.tenant_id, name=name, created_at=tenant.created_at)
    )
    return tenant


def read_tenants(connection: Connection) -> list[Tenant]:
    rows = connection.execute(select(_tenants).order_by(_tenants.c.name))
    return [Tenant(**row) for row in rows.mappings()]


def insert_key(
    connection: Connection, tenant_name: str, *, scopes: frozenset[str], expires_at: str | None, at: str
) -> str:
    """Return the new key, which is stored nowhere. Raises NotFound `TENANT_UNKNOWN`."""
    tenant = _tenant_by_name(connection, tenant_name)
    if tenant is None:
        raise NotFound("TENANT_UNKNOWN", f"there is no tenant {tenant_name!r}")
    if not scopes or any(not scope or " " in scope for scope in scopes):
        raise InvalidInput("SCOPES_INVALID", f"a key needs scopes without spaces, got {sorted(scopes)}")
    key = ids.new_api_key()
    connection.execute(
        _keys.insert().values(
            key_id=ids.key_id_of(key),
            tenant_id=tenant.tenant_id,
            key_sha256=ids.api_key_digest(key),
            scopes=" ".join(sorted(scopes)),
            created_at=at,
            expires_at=expires_at,
        )
    )
    return key


def read_keys(connection: Connection) -> list[ApiKey]:
    rows = connection.execute(
        select(*_key_columns).join(_tenants).order_by(_keys.c.created_at, _keys.c.key_id)
    )
    return [_api_key(row) for row in rows.mappings()]


def mark_key_revoked(connection: Connection, key_id: str, *, at: str) -> None:
    """The key opens nothing from now on; a second time changes nothing. Raises NotFound `KEY_UNKNOWN`."""
    if connection.execute(select(_keys.c.key_id).where(_keys.c.key_id == key_id)).first() is None:
        raise NotFound("KEY_UNKNOWN", f"there is no key {key_id!r}")
    connection.execute(
        _keys.update().where(_keys.c.key_id == key_id, _keys.c.revoked_at.is_(None)).values(revoked_at=at)
    )


def find_key(connection: Connection, key: str, *, at: str) -> ApiKey | None:
    """Who the key is, None if unknown, revoked or expired. The use is noted by `note_use`.

    Looked up by the digest of 256 random bits, so that the time of a comparison tells nothing of the key.
    """
    digest = ids.api_key_digest(key)
    row = (
        connection.execute(
            select(*_key_columns, _keys.c.key_sha256)
            .join(_tenants)
            .where(_keys.c.key_sha256 == digest, _keys.c.revoked_at.is_(None))
        )
        .mappings()
        .one_or_none()
    )
    if row is None or not hmac.compare_digest(row["key_sha256"], digest):
        return None
    found = _api_key(row)
    return None if has_expired(found, at) else found


def has_expired(key: ApiKey, at: str) -> bool:
    return key.expires_at is not None and key.expires_at <= at


def note_use(connection: Connection, key: ApiKey, *, at: str) -> None:
    connection.execute(_keys.update().where(_keys.c.key_id == key.key_id).values(last_used_at=at))


def read_tenant(connection: Connection, tenant_id: str) -> Tenant:
    row = connection.execute(select(_tenants).where(_tenants.c.tenant_id == tenant_id)).mappings().one()
    return Tenant(**row)


def _tenant_by_name(connection: Connection, name: str) -> Tenant | None:
    row = connection.execute(select(_tenants).where(_tenants.c.name == name)).mappings().one_or_none()
    return None if row is None else Tenant(**row)


def is_stale(last_used_at: str | None, at: str) -> bool:
    """The last use is to be noted anew."""
    if last_used_at is None:
        return True
    return abs(_moment(at) - _moment(last_used_at)) >= LAST_USED_RESOLUTION


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _api_key(row: RowMapping) -> ApiKey:
    fields = {name: value for name, value in row.items() if name != "key_sha256"}
    return ApiKey(scopes=frozenset(fields.pop("scopes").split()), **fields)
