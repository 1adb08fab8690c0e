"""How many jobs of a tenant train at once: those above its cap wait, by priority and then by age.

Those whose deadlines are in danger go first, the earliest deadline first.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from dataclasses import dataclass, field

from cola_runtime.scheduler.policy import NOT_DUE
from cola_runtime.scheduler.waiting import Due
from cola_runtime.types import Priority


@dataclass(slots=True, order=True)
class _Place:
    rank: int
    number: int
    job_id: str = field(compare=False)
    due: Due | None = field(compare=False, default=None)
    granted: asyncio.Event = field(compare=False, default_factory=asyncio.Event)

    def order(self, now: float) -> tuple[float, int, int]:
        late = self.due is not None and self.due.in_danger(now)
        return (self.due.deadline if self.due is not None and late else NOT_DUE), self.rank, self.number


@dataclass(slots=True)
class _Tenant:
    limit: int | None = None
    running: set[str] = field(default_factory=set)
    line: list[_Place] = field(default_factory=list)


class JobSlots:
    """Grants and takes back; a cap that is lowered stops nobody who runs."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._arrivals = 0

    def set_limit(self, tenant_id: str, limit: int | None) -> None:
        tenant = self._tenants.setdefault(tenant_id, _Tenant())
        tenant.limit = limit
        self._grant(tenant)

    async def enter(self, tenant_id: str, job_id: str, *, priority: Priority, due: Due | None) -> None:
        """Return when the job may train. Cancelling gives the place in the line back."""
        tenant = self._tenants.setdefault(tenant_id, _Tenant())
        self._arrivals += 1
        place = _Place(-priority, self._arrivals, job_id, due)
        insort(tenant.line, place)
        self._grant(tenant)
        try:
            await place.granted.wait()
        except asyncio.CancelledError:
            if place in tenant.line:
                tenant.line.remove(place)
            self.leave(tenant_id, job_id)
            raise

    def leave(self, tenant_id: str, job_id: str) -> None:
        tenant = self._tenants[tenant_id]
        tenant.running.discard(job_id)
        self._grant(tenant)

    def waiting_reason(self, tenant_id: str, job_id: str) -> str | None:
        """Why the job may not train yet; None when it may."""
        tenant = self._tenants.get(tenant_id, _Tenant())
        now = asyncio.get_running_loop().time()
        for ahead, place in enumerate(sorted(tenant.line, key=lambda each: each.order(now))):
            if place.job_id == job_id:
                return (
                    f"its tenant's cap of {tenant.limit} concurrent jobs is reached: {len(tenant.running)} "
                    f"are running, {ahead} wait before it"
                )
        return None

    def _grant(self, tenant: _Tenant) -> None:
        while tenant.line and (tenant.limit is None or len(tenant.running) < tenant.limit):
            now = asyncio.get_running_loop().time()
            place = min(tenant.line, key=lambda each: each.order(now))
            tenant.line.remove(place)
            tenant.running.add(place.job_id)
            place.granted.set()
