"""The fair queue as its rules read: everything that waits is sorted anew for each decision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from cola_runtime.scheduler.filling import Offer, fill
from cola_runtime.scheduler.packing import length_bands
from cola_runtime.scheduler.policy import LEAD, LOOK_AHEAD
from cola_runtime.scheduler.waiting import Share, Waiting


@dataclass
class PlainTenant:
    share: Share = field(default_factory=Share)
    counter: float = 0.0
    since: int = 0
    ready_at: float = -math.inf
    kept_back: bool = False
    floors: dict[int, float] = field(default_factory=dict)


class PlainQueue:
    """Same methods and results as FairQueue; O(n log n) each."""

    def __init__(self) -> None:
        self.tenants: dict[str, PlainTenant] = {}
        self.jobs: dict[tuple[str, str], float] = {}  # counters
        self.waiting: dict[int, Waiting] = {}
        self.floor = 0.0

    def set_share(self, tenant_id: str, share: Share) -> None:
        tenant = self.tenants.setdefault(tenant_id, PlainTenant())
        tenant.share = share
        if share.tokens_per_minute is None:
            tenant.ready_at = -math.inf

    def add(self, waiting: Waiting, *, now: float) -> None:
        tenant = self.tenants.setdefault(waiting.tenant_id, PlainTenant())
        job = (waiting.tenant_id, waiting.job_id)
        mine = [w for w in self.waiting.values() if w.tenant_id == waiting.tenant_id]
        if not mine:
            tenant.counter, tenant.since = max(tenant.counter, self.floor), waiting.ticket
        if not any(w.job_id == waiting.job_id for w in mine):
            self.jobs[job] = max(self.jobs.get(job, 0.0), tenant.floors.get(-waiting.priority, 0.0))
        self.waiting[waiting.ticket] = waiting
        self._keep_back(tenant, waiting.tenant_id, now)

    def remove(self, ticket: int, *, now: float) -> None:
        self.waiting.pop(ticket, None)

    def charge(self, tenant_id: str, tokens: int, *, now: float) -> None:
        tenant = self.tenants.setdefault(tenant_id, PlainTenant())
        if not any(w.tenant_id == tenant_id for w in self.waiting.values()):
            tenant.counter = max(tenant.counter, self.floor)
        self._count(tenant, tokens, now)
        self._keep_back(tenant, tenant_id, now)

    def choose(self, *, token_budget: int, now: float) -> tuple[Waiting, ...]:
        for tenant_id in self.tenants:
            tenant = self.tenants[tenant_id]
            if tenant.kept_back and tenant.ready_at <= now:
                tenant.kept_back, tenant.counter = False, max(tenant.counter, self.floor)
        waits = {w.tenant_id for w in self.waiting.values()}
        order = sorted((t for t in waits if not self.tenants[t].kept_back), key=self._place)
        if not order:
            return ()
        lead = LEAD * token_budget
        first = self._jobs_of(order[0], now)[0]
        members = [t for t in order if any(w.of_class == first.of_class for w in self._jobs_of(t, now))]
        each, offers = max(1, LOOK_AHEAD // len(members)), []
        for member in members[:LOOK_AHEAD]:
            jobs = self._jobs_of(member, now)
            least = self.jobs[member, jobs[0].job_id]
            found = [
                w
                for w in jobs[:LOOK_AHEAD]
                if w.of_class == first.of_class
                and _rank(w, now) == _rank(jobs[0], now)
                and self.jobs[member, w.job_id] - least <= lead
            ][:each]
            tenant = self.tenants[member]
            count = sum(w.tenant_id == member for w in self.waiting.values())
            offers.append(Offer(member, tenant.counter, tenant.share.weight, count, found))
        seen = [w for offer in offers for w in offer.microbatches]
        bands = length_bands(
            [w.padded.total for w in seen], [w.rows for w in seen], token_budget=token_budget
        )
        band = next(b for b in bands if first.padded.total in b)
        offering = {offer.tenant_id for offer in offers}
        outside = min((self.tenants[t].counter for t in order if t not in offering), default=math.inf)
        return fill(offers, band, token_budget=token_budget, lead=lead, outside=outside)

    def take(self, chosen: Sequence[Waiting], *, now: float) -> None:
        served = {waiting.tenant_id for waiting in chosen}
        self.floor = max(self.floor, min(self.tenants[t].counter for t in served))
        for waiting in chosen:
            tenant, job = self.tenants[waiting.tenant_id], (waiting.tenant_id, waiting.job_id)
            rank = -waiting.priority
            if not waiting.in_danger(now):
                tenant.floors[rank] = max(tenant.floors.get(rank, 0.0), self.jobs[job])
            self.jobs[job] += waiting.tokens
            self._count(tenant, waiting.tokens, now)
            del self.waiting[waiting.ticket]
        for tenant_id in served:
            self._keep_back(self.tenants[tenant_id], tenant_id, now)

    def _count(self, tenant: PlainTenant, tokens: int, now: float) -> None:
        tenant.counter += tokens / tenant.share.weight
        if tenant.share.tokens_per_minute is not None:
            spent = 60.0 * tokens / tenant.share.tokens_per_minute
            tenant.ready_at = max(tenant.ready_at, now) + spent

    def _keep_back(self, tenant: PlainTenant, tenant_id: str, now: float) -> None:
        if tenant.ready_at > now and any(w.tenant_id == tenant_id for w in self.waiting.values()):
            tenant.kept_back = True

    def _place(self, tenant_id: str) -> tuple[float, int]:
        return self.tenants[tenant_id].counter, self.tenants[tenant_id].since

    def _jobs_of(self, tenant_id: str, now: float) -> list[Waiting]:
        """The oldest microbatch of each of its jobs, in order."""
        oldest: dict[str, Waiting] = {}
        for waiting in sorted(self.waiting.values(), key=lambda w: w.ticket):
            if waiting.tenant_id == tenant_id:
                oldest.setdefault(waiting.job_id, waiting)
        return sorted(
            oldest.values(), key=lambda w: (*_rank(w, now), self.jobs[tenant_id, w.job_id], w.ticket)
        )


def _rank(waiting: Waiting, now: float) -> tuple[float, int]:
    """Jobs whose deadlines are in danger first, the earliest deadline first; then by priority."""
    deadline = waiting.due.deadline if waiting.due and waiting.due.in_danger(now) else math.inf
    return deadline, -waiting.priority
