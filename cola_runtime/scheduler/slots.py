"""How many jobs of a tenant train at once: those above its cap wait, by priority and then by age.

Those whose deadlines are in danger go first, the earliest deadline first.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from dataclasses import dataclass, field

from cola_runtime.job_choices import Priority
from cola_runtime.scheduler.policy import NOT_DUE
from cola_runtime.scheduler.waiting import Due


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
    line: list[_Place] = field(default_factory=list)  # by rank, then number
    places: dict[str, _Place] = field(default_factory=dict)  # of the line, by job
    dated: list[_Place] = field(default_factory=list)  # of the line, those with a deadline

    def join(self, place: _Place) -> None:
        insort(self.line, place)
        self.places[place.job_id] = place
        if place.due is not None:
            self.dated.append(place)

    def drop(self, place: _Place) -> None:
        del self.line[bisect_left(self.line, place)]
        del self.places[place.job_id]
        if place.due is not None:
            self.dated.remove(place)

    def first(self, now: float) -> _Place:
        return min([self.line[0], *self.dated], key=lambda each: each.order(now))

    def ahead(self, place: _Place, now: float) -> int:
        """How many go before. Who asks for a page of jobs asks this of each."""
        own = place.order(now)
        late = [each.order(now) for each in self.dated if each.order(now)[0] != NOT_DUE]
        if own[0] != NOT_DUE:
            return sum(other < own for other in late)
        return bisect_left(self.line, place) + sum(other[1:] > own[1:] for other in late)


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
        tenant.join(place)
        self._grant(tenant)
        try:
            await place.granted.wait()
        except asyncio.CancelledError:
            if tenant.places.get(job_id) is place:
                tenant.drop(place)
            self.leave(tenant_id, job_id)
            raise

    def leave(self, tenant_id: str, job_id: str) -> None:
        tenant = self._tenants[tenant_id]
        tenant.running.discard(job_id)
        self._grant(tenant)

    def waiting_reason(self, tenant_id: str, job_id: str) -> str | None:
        """Why the job may not train yet; None when it may."""
        tenant = self._tenants.get(tenant_id, _Tenant())
        place = tenant.places.get(job_id)
        if place is None:
            return None
        ahead = tenant.ahead(place, asyncio.get_running_loop().time())
        return (
            f"its tenant's cap of {tenant.limit} concurrent jobs is reached: {len(tenant.running)} "
            f"are running, {ahead} wait before it"
        )

    def _grant(self, tenant: _Tenant) -> None:
        while tenant.line and (tenant.limit is None or len(tenant.running) < tenant.limit):
            place = tenant.first(asyncio.get_running_loop().time())
            tenant.drop(place)
            tenant.running.add(place.job_id)
            place.granted.set()
