"""Tenants and their keys: what an operator does while the service has its store to itself."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta

from cola_runtime import ids
from cola_runtime.errors import Conflict, InvalidInput, NotFound
from cola_runtime.jobs.audit import AuditEntry
from cola_runtime.jobs.records import ApiKey, TenantTerms, TermChanges
from cola_runtime.jobs.store import ALL_SCOPES, JobStore
from cola_runtime.server.rules import ADMIN, READ, TENANT_SCOPES, WRITE

MOST_KEY_SECONDS = 10 * 365 * 86_400
KNOWN_SCOPES = (READ, WRITE, ADMIN, ALL_SCOPES)


@dataclass(frozen=True, slots=True, kw_only=True)
class CreatedKey:
    key: str  # in the clear, for the only time
    tenant: str
    scopes: tuple[str, ...]
    tenant_id: str
    terms: TenantTerms  # of the tenant, as they are now


async def create_key(
    store: JobStore,
    tenant: str,
    scopes: Collection[str] = (),
    *,
    changes: TermChanges | None = None,
    expires_in_seconds: int = 0,
    audited_as: str = "",
) -> CreatedKey:
    """A new key; a tenant of that name is created if there is none, and its terms changed.

    `audited_as` is who asks, where no door leaves an audit entry.

    With 0 seconds it does not end by itself.

    Raises InvalidInput `SCOPE_UNKNOWN`, `TERMS_INVALID`, `KEY_LIFE`.
    """
    wanted = tuple(sorted(set(scopes) or TENANT_SCOPES))
    unknown = [scope for scope in wanted if scope not in KNOWN_SCOPES]
    if unknown:
        raise InvalidInput(
            "SCOPE_UNKNOWN",
            f"unknown scope {', '.join(map(repr, unknown))}",
            where="scopes",
            remedy=f"Known scopes: {', '.join(KNOWN_SCOPES)}.",
        )
    if expires_in_seconds > MOST_KEY_SECONDS:
        raise InvalidInput(
            "KEY_LIFE",
            "a key with an end is not valid for so long",
            where="expires_in_seconds",
            limit=MOST_KEY_SECONDS,
            actual=expires_in_seconds,
        )
    with contextlib.suppress(Conflict):  # the tenant exists already
        await store.create_tenant(tenant)
    tenant_id = next(each.tenant_id for each in await store.tenants() if each.name == tenant)
    terms = await store.accounts.change_terms(tenant_id, changes or TermChanges())
    life = timedelta(seconds=expires_in_seconds) if expires_in_seconds else None
    key = await store.create_key(tenant, scopes=wanted, expires_in=life)
    if audited_as:
        told = f"tenant {tenant}, scopes {', '.join(wanted)}"
        await store.audit.add(
            AuditEntry(kind="key.created", actor=audited_as, subject=ids.key_id_of(key), message=told)
        )
    return CreatedKey(key=key, tenant=tenant, scopes=wanted, tenant_id=tenant_id, terms=terms)


async def revoke_key(store: JobStore, key_id: str, *, audited_as: str = "") -> ApiKey:
    """The key opens nothing from now on. Raises NotFound `KEY_UNKNOWN`."""
    await store.revoke_key(key_id)
    if audited_as:
        await store.audit.add(AuditEntry(kind="key.revoked", actor=audited_as, subject=key_id))
    for key in await store.keys():
        if key.key_id == key_id:
            return key
    raise NotFound("KEY_UNKNOWN", f"there is no key {key_id!r}")
