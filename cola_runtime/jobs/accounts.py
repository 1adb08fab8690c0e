"""What tenants may have and what they have used: the store's door to terms and accounts."""

from __future__ import annotations

from cola_runtime.jobs import terms, usage
from cola_runtime.jobs.database import Database
from cola_runtime.jobs.records import TenantLoad, TenantTerms, TermChanges, Usage


class Accounts:
    """Every method one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def terms(self, tenant_id: str) -> TenantTerms:
        return await self._database.run(lambda c: terms.read_terms(c, tenant_id))

    async def change_terms(self, tenant_id: str, changes: TermChanges) -> TenantTerms:
        """Raises InvalidInput `TERMS_INVALID`."""
        return await self._database.run(lambda c: terms.change_terms(c, tenant_id, changes))

    async def steps(self, tenant_id: str) -> int:
        """Taken by its jobs so far, and to come of those that have not ended."""
        return await self._database.run(lambda c: terms.steps_of(c, tenant_id))

    async def usage(self, tenant_id: str) -> Usage:
        """What the tenant's jobs have used."""
        [found] = await self._database.run(lambda c: usage.read_usage(c, tenant_id=tenant_id))
        return found

    async def usage_of_all(self) -> list[Usage]:
        """Of every tenant, by name."""
        return await self._database.run(usage.read_usage)

    async def loads(self, base_model: str) -> list[TenantLoad]:
        """Of the tenants that have jobs of this base model queued or running."""
        return await self._database.run(lambda c: usage.read_loads(c, base_model))
