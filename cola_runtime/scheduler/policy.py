"""Who goes into the next base step: a fair queue of what waits. Pure: no clock, no I/O; `now` is passed in.

Tenants are ordered by a virtual counter (every token computed for a tenant adds 1 / weight), a tenant's jobs
by priority and then by a counter of their own; those whose deadlines are in danger go before them. Whoever
comes back from idleness starts at the counter of the tenant served last, so that idleness cannot be saved up.
The order, its bounds and its costs are stated in docs/scheduling.md.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice

from cola_runtime.scheduler.filling import NOBODY, Offer, fill
from cola_runtime.scheduler.ordered import SortedKeys
from cola_runtime.scheduler.packing import length_bands
from cola_runtime.scheduler.waiting import Class, Share, Standing, Waiting

LOOK_AHEAD = 64  # microbatches that a decision looks at, in fair order
LEAD = 1 / 8  # share of the token budget by which a tenant may run ahead of the least served one
KEPT_IDLE_JOBS = 64  # per tenant, before their counters are looked through for ones that are not needed

TenantKey = tuple[float, int, str]  # counter, ticket with which it began to wait, tenant
JobKey = tuple[float, int, float, int, str]  # deadline, -priority, counter, oldest ticket, job
NOT_DUE = math.inf  # the deadline in the key of a job that has none, or whose deadline is in no danger


@dataclass(slots=True)
class _Job:
    job_id: str
    counter: float = 0.0  # tokens served
    tickets: list[int] = field(default_factory=list)  # ascending; only the first may go
    key: JobKey | None = None  # as it stands in the tenant's orders; None: nothing waits
    start: tuple[float, int] | None = None  # latest start and oldest ticket, until that is in danger


@dataclass(slots=True)
class _Tenant:
    tenant_id: str
    share: Share = field(default_factory=Share)
    counter: float = 0.0  # tokens served / weight
    since: int = 0
    ready_at: float = -math.inf  # tokens_per_minute keeps it back until then
    kept_back: bool = False
    waits: int = 0  # microbatches
    key: TenantKey | None = None  # as it stands in the queue's orders; None: it may not go now
    jobs: dict[str, _Job] = field(default_factory=dict)
    order: SortedKeys[JobKey] = field(default_factory=SortedKeys)
    classes: Counter[Class] = field(default_factory=Counter)  # of the oldest microbatches
    floors: dict[int, float] = field(default_factory=dict)  # -priority -> counter of the job served last


class FairQueue:
    """What waits, in fair order. A decision costs O(log n) in what waits, beside what it looks at and takes.

    (For a tenant with jobs in several gangs, once per gang.)
    """

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._entries: dict[int, Waiting] = {}
        self._order: SortedKeys[TenantKey] = SortedKeys()
        self._classes: dict[Class, SortedKeys[TenantKey]] = {}
        self._kept_back: list[tuple[float, str]] = []  # a heap of (ready_at, tenant)
        self._starts: SortedKeys[tuple[float, int]] = SortedKeys()  # of all jobs that have one
        self._floor = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, ticket: int) -> bool:
        return ticket in self._entries

    def set_share(self, tenant_id: str, share: Share) -> None:
        """From the next token on."""
        tenant = self._tenant(tenant_id)
        tenant.share = share
        if share.tokens_per_minute is None:
            tenant.ready_at = -math.inf
            heapq.heappush(self._kept_back, (tenant.ready_at, tenant_id))

    def counter(self, tenant_id: str) -> float:
        """Tokens served / weight, and what the tenant was lifted by whenever it came back."""
        return self._tenants[tenant_id].counter

    def add(self, waiting: Waiting, *, now: float) -> None:
        tenant = self._tenant(waiting.tenant_id)
        job = tenant.jobs.get(waiting.job_id)
        if job is None:
            job = tenant.jobs[waiting.job_id] = _Job(waiting.job_id)
        self._entries[waiting.ticket] = waiting
        if not tenant.waits:
            tenant.counter, tenant.since = max(tenant.counter, self._floor), waiting.ticket
        if not job.tickets:
            job.counter = max(job.counter, tenant.floors.get(-waiting.priority, 0.0))
        tenant.waits += 1
        insort(job.tickets, waiting.ticket)
        if job.tickets[0] == waiting.ticket:
            self._leave(tenant)
            self._unplace(tenant, job)
            self._place(tenant, job, now)
            self._enter(tenant, now)

    def remove(self, ticket: int, *, now: float) -> None:
        """Nothing happens when it does not wait (any more)."""
        waiting = self._entries.get(ticket)
        if waiting is not None:
            tenant = self._tenants[waiting.tenant_id]
            self._leave(tenant)
            self._drop(tenant, waiting, now)
            self._enter(tenant, now)

    def charge(self, tenant_id: str, tokens: int, *, now: float, most_ahead: float = math.inf) -> None:
        """Count what was computed for a tenant beside the queue; its jobs' order stays as it is.

        It does not lift the tenant's counter further than `most_ahead` above the tenant's served last: what
        was computed where nobody else wanted it is not held against it for long.
        """
        tenant = self._tenant(tenant_id)
        before, most = tenant.counter, self._floor + most_ahead
        if tenant.waits:
            self._leave(tenant)
        elif before < self._floor:
            before = self._floor  # else its return would forget these tokens
        tenant.counter = before
        self._count(tenant, tokens, now)
        if tenant.counter > most:
            tenant.counter = max(before, most)
        if tenant.waits:
            self._enter(tenant, now)

    def choose(self, *, token_budget: int, now: float, room: float = math.inf) -> tuple[Waiting, ...]:
        """The microbatches of the next base step; () when nobody may go. Nothing is taken: see `take`.

        `room`: computed tokens, where a step of no gang that trains should hold less than its budget.

        The oldest microbatch of the least served tenant's first job always goes; those of near length behind
        it in fair order join it (`length_bands`), as long as there is room and nobody runs ahead of who has
        to wait by more than LEAD (`fill`). One above the budget goes alone.
        """
        self._let_back(now)
        self._let_due(now)
        if not self._order:
            return ()
        head = self._head(self._tenants[self._order.first[2]])
        lead = LEAD * token_budget
        offers = self._offers(head.of_class, lead)
        seen = [waiting for offer in offers for waiting in offer.microbatches]
        lengths = [waiting.padded.total for waiting in seen]
        bands = length_bands(lengths, [waiting.rows for waiting in seen], token_budget=token_budget)
        band = next(band for band in bands if head.padded.total in band)
        outside = self._least_beside({offer.tenant_id for offer in offers})
        budget = min(token_budget, room) if head.of_class == (True, None) else token_budget
        return fill(offers, band, token_budget=budget, lead=lead, outside=outside)

    def take(self, chosen: Sequence[Waiting], *, now: float) -> None:
        """Charge these microbatches to their tenants and jobs; they no longer wait."""
        tenants = {waiting.tenant_id: self._tenants[waiting.tenant_id] for waiting in chosen}
        self._floor = max(self._floor, min(tenant.counter for tenant in tenants.values()))
        for tenant in tenants.values():
            self._leave(tenant)
        for waiting in chosen:
            self._serve(waiting, now)
        for tenant in tenants.values():
            self._enter(tenant, now)

    def next_ready(self) -> float | None:
        """When the next tenant that its tokens per minute keep back may go."""
        return self._kept_back[0][0] if self._kept_back else None

    def standing(self, ticket: int) -> Standing:
        """Where a waiting microbatch stands. Raises KeyError for one that does not wait."""
        waiting = self._entries[ticket]
        tenant = self._tenants[waiting.tenant_id]
        job = tenant.jobs[waiting.job_id]
        first = self._tenants[self._order.first[2]] if self._order else tenant
        jobs_ahead = tenant.order.index(job.key) if job.key else 0
        return Standing(
            tenants_ahead=self._order.index(tenant.key) if tenant.key else 0,
            jobs_ahead=jobs_ahead,
            due_ahead=sum(key[0] < NOT_DUE for key in islice(tenant.order, jobs_ahead)),
            due=job.key is not None and job.key[0] < NOT_DUE,
            earlier_microbatches=job.tickets.index(ticket),
            ready_at=tenant.ready_at if tenant.kept_back else None,
            tokens_per_minute=tenant.share.tokens_per_minute,
            gang_first=self._head(first).gang,
            gang=waiting.gang,
        )

    # What may go beside the first

    def _offers(self, of_class: Class, lead: float) -> list[Offer]:
        """The fairest tenants' microbatches of the class: at most LOOK_AHEAD, evenly from the tenants."""
        keys = self._classes[of_class]
        each = max(1, LOOK_AHEAD // len(keys))
        offers = []
        for counter, _, tenant_id in islice(keys, LOOK_AHEAD):
            tenant = self._tenants[tenant_id]
            microbatches = self._microbatches(tenant, of_class, most=each, lead=lead)
            offers.append(Offer(tenant_id, counter, tenant.share.weight, tenant.waits, microbatches))
        return offers

    def _microbatches(self, tenant: _Tenant, of_class: Class, *, most: int, lead: float) -> list[Waiting]:
        """Of the tenant's first jobs: none that goes behind by deadline or priority, none further ahead than
        `lead`.
        """
        earliest, first, least, oldest, _ = tenant.order.first
        if most == 1 and self._entries[oldest].of_class == of_class:
            return [self._entries[oldest]]
        found: list[Waiting] = []
        for deadline, rank, counter, ticket, _ in islice(tenant.order, LOOK_AHEAD):
            behind = rank != first or deadline != earliest
            if behind or counter - least > lead or len(found) == most:
                break
            waiting = self._entries[ticket]
            if waiting.of_class == of_class:
                found.append(waiting)
        return found

    def _least_beside(self, offering: Collection[str]) -> float:
        return next((key[0] for key in self._order if key[2] not in offering), NOBODY)

    # What a tenant has waiting

    def _tenant(self, tenant_id: str) -> _Tenant:
        tenant = self._tenants.get(tenant_id)
        if tenant is None:
            tenant = self._tenants[tenant_id] = _Tenant(tenant_id)
        return tenant

    def _head(self, tenant: _Tenant) -> Waiting:
        return self._entries[tenant.order.first[3]]

    def _serve(self, waiting: Waiting, now: float) -> None:
        tenant = self._tenants[waiting.tenant_id]
        job, rank = tenant.jobs[waiting.job_id], -waiting.priority
        if not waiting.in_danger(now):  # one that goes before its turn says nothing of where others begin
            tenant.floors[rank] = max(tenant.floors.get(rank, 0.0), job.counter)
        self._unplace(tenant, job)
        job.counter += waiting.tokens
        self._count(tenant, waiting.tokens, now)
        self._drop(tenant, waiting, now)

    def _count(self, tenant: _Tenant, tokens: int, now: float) -> None:
        """The tenant is out of the queue's orders meanwhile."""
        tenant.counter += tokens / tenant.share.weight
        if tenant.share.tokens_per_minute is not None:
            tenant.ready_at = max(tenant.ready_at, now) + 60.0 * tokens / tenant.share.tokens_per_minute

    def _drop(self, tenant: _Tenant, waiting: Waiting, now: float) -> None:
        """One that no longer waits; the tenant is out of the queue's orders meanwhile."""
        job = tenant.jobs[waiting.job_id]
        self._unplace(tenant, job)
        tenant.waits -= 1
        job.tickets.remove(waiting.ticket)
        del self._entries[waiting.ticket]
        self._place(tenant, job, now)
        if not job.tickets and len(tenant.jobs) > 2 * len(tenant.order) + KEPT_IDLE_JOBS:
            self._forget_idle_jobs(tenant)

    def _place(self, tenant: _Tenant, job: _Job, now: float) -> None:
        """Put the job where its oldest microbatch belongs among the tenant's jobs."""
        if not job.tickets:
            return
        waiting, deadline = self._entries[job.tickets[0]], NOT_DUE
        if waiting.due is not None and waiting.in_danger(now):
            deadline = waiting.due.deadline
        elif waiting.due is not None:
            job.start = (waiting.due.latest_start, waiting.ticket)
            self._starts.add(job.start)
        job.key = (deadline, -waiting.priority, job.counter, waiting.ticket, job.job_id)
        tenant.order.add(job.key)
        tenant.classes[waiting.of_class] += 1

    def _unplace(self, tenant: _Tenant, job: _Job) -> None:
        if job.key is not None:
            of_class = self._entries[job.key[3]].of_class
            tenant.order.remove(job.key)
            tenant.classes[of_class] -= 1
            if not tenant.classes[of_class]:
                del tenant.classes[of_class]
            job.key = None
        if job.start is not None:
            self._starts.remove(job.start)
            job.start = None

    def _forget_idle_jobs(self, tenant: _Tenant) -> None:
        """An idle job at or below the floor of every priority would start there anyway."""
        floor = min(tenant.floors.values(), default=0.0)
        tenant.jobs = {name: job for name, job in tenant.jobs.items() if job.tickets or job.counter > floor}

    # Where a tenant stands among all

    def _enter(self, tenant: _Tenant, now: float) -> None:
        """Take part in the order again, unless nothing waits or the tokens per minute are spent."""
        if not tenant.waits or tenant.kept_back:
            return
        if tenant.ready_at > now:
            tenant.kept_back = True
            heapq.heappush(self._kept_back, (tenant.ready_at, tenant.tenant_id))
            return
        tenant.key = (tenant.counter, tenant.since, tenant.tenant_id)
        self._order.add(tenant.key)
        for of_class in tenant.classes:
            self._classes.setdefault(of_class, SortedKeys()).add(tenant.key)

    def _leave(self, tenant: _Tenant) -> None:
        if tenant.key is None:
            return
        self._order.remove(tenant.key)
        for of_class in tenant.classes:
            self._classes[of_class].remove(tenant.key)
            if not self._classes[of_class]:
                del self._classes[of_class]
        tenant.key = None

    def _let_due(self, now: float) -> None:
        """Deadlines that have come into danger while their jobs wait."""
        while len(self._starts) and self._starts.first[0] <= now:
            waiting = self._entries[self._starts.first[1]]
            tenant = self._tenants[waiting.tenant_id]
            job = tenant.jobs[waiting.job_id]
            self._leave(tenant)
            self._unplace(tenant, job)
            self._place(tenant, job, now)
            self._enter(tenant, now)

    def _let_back(self, now: float) -> None:
        while self._kept_back and self._kept_back[0][0] <= now:
            tenant = self._tenants[heapq.heappop(self._kept_back)[1]]
            if tenant.kept_back and tenant.ready_at > now:  # charged meanwhile
                heapq.heappush(self._kept_back, (tenant.ready_at, tenant.tenant_id))
            elif tenant.kept_back:
                tenant.kept_back = False
                tenant.counter = max(tenant.counter, self._floor)
                self._enter(tenant, now)
