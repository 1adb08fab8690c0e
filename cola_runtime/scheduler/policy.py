"""Who goes into the next base step: a fair queue of what waits. Pure: no clock, no I/O; `now` is passed in.

Tenants are ordered by a virtual counter (every token computed for a tenant adds 1 / weight), a tenant's jobs
by priority and then by a counter of their own. Whoever comes back from idleness starts at the counter of the
tenant served last, so that idleness cannot be saved up. The order, its bounds and its costs are stated in
docs/scheduling.md.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice

from cola_runtime.scheduler.filling import NOBODY, Offer, Row, fill
from cola_runtime.scheduler.ordered import SortedKeys
from cola_runtime.scheduler.packing import length_bands
from cola_runtime.scheduler.waiting import Class, Part, Share, Standing, Waiting

LOOK_AHEAD = 64  # microbatches that a decision looks at, in fair order
LOOK_AHEAD_ROWS = 2048  # and rows
LEAD = 1 / 8  # share of the token budget by which a tenant may run ahead of the least served one
KEPT_IDLE_JOBS = 64  # per tenant, before their counters are looked through for ones that are not needed

TenantKey = tuple[float, int, str]  # counter, ticket with which it began to wait, tenant
JobKey = tuple[int, float, int, str]  # -priority, counter, oldest ticket, job


@dataclass(slots=True)
class _Entry:
    waiting: Waiting
    of_class: Class
    rows: list[Row]  # that are left, longest first


@dataclass(slots=True)
class _Job:
    job_id: str
    counter: float = 0.0  # tokens served
    tickets: list[int] = field(default_factory=list)  # ascending; only the first may go
    key: JobKey | None = None  # as it stands in the tenant's orders; None: nothing waits


@dataclass(slots=True)
class _Tenant:
    tenant_id: str
    share: Share = field(default_factory=Share)
    counter: float = 0.0  # tokens served / weight
    since: int = 0
    ready_at: float = -math.inf  # tokens_per_minute keeps it back until then
    kept_back: bool = False
    rows: int = 0  # that wait
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
        self._entries: dict[int, _Entry] = {}
        self._order: SortedKeys[TenantKey] = SortedKeys()
        self._classes: dict[Class, SortedKeys[TenantKey]] = {}
        self._kept_back: list[tuple[float, str]] = []  # a heap of (ready_at, tenant)
        self._floor = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, ticket: int) -> bool:
        return ticket in self._entries

    def set_share(self, tenant_id: str, share: Share) -> None:
        """From the next token on."""
        tenant = self._tenants.setdefault(tenant_id, _Tenant(tenant_id))
        tenant.share = share
        if share.tokens_per_minute is None:
            tenant.ready_at = -math.inf
            heapq.heappush(self._kept_back, (tenant.ready_at, tenant_id))

    def counter(self, tenant_id: str) -> float:
        """Tokens served / weight, and what the tenant was lifted by whenever it came back."""
        return self._tenants[tenant_id].counter

    def add(self, waiting: Waiting, *, now: float) -> None:
        tenant = self._tenants.setdefault(waiting.tenant_id, _Tenant(waiting.tenant_id))
        job = tenant.jobs.setdefault(waiting.job_id, _Job(waiting.job_id))
        longest_first = sorted(zip(waiting.lengths, waiting.rows, strict=True), key=_longest_first)
        self._entries[waiting.ticket] = _Entry(waiting, waiting.of_class, longest_first)
        if not tenant.rows:
            tenant.counter, tenant.since = max(tenant.counter, self._floor), waiting.ticket
        if not job.tickets:
            job.counter = max(job.counter, tenant.floors.get(-waiting.priority, 0.0))
        tenant.rows += len(waiting.rows)
        insort(job.tickets, waiting.ticket)
        if job.tickets[0] == waiting.ticket:
            self._leave(tenant)
            self._unplace(tenant, job)
            self._place(tenant, job)
            self._enter(tenant, now)

    def remove(self, ticket: int, *, now: float) -> None:
        """Nothing happens when it does not wait (any more)."""
        entry = self._entries.get(ticket)
        if entry is not None:
            tenant = self._tenants[entry.waiting.tenant_id]
            self._leave(tenant)
            self._drop(tenant, entry, {row for _, row in entry.rows})
            self._enter(tenant, now)

    def choose(self, *, token_budget: int, now: float) -> tuple[Part, ...]:
        """The rows of the next base step; () when nobody may go. Nothing is taken: see `take`.

        The least served tenant's first job goes first, with the longest rows that its oldest microbatch has
        left; rows of near length join it from those behind it in fair order (`length_bands`), as long as
        nobody runs ahead of who has to wait by more than LEAD (`fill`). A row above the budget goes alone.
        """
        self._let_back(now)
        if not self._order:
            return ()
        head = self._head(self._tenants[self._order.first[2]])
        lead = LEAD * token_budget
        offers = self._offers(head.of_class, lead)
        lengths = [[length for length, _ in rows] for offer in offers for _, rows in offer.microbatches]
        bands = length_bands(lengths, token_budget=token_budget)
        band = next(band for band in bands if head.rows[0][0] in band)
        outside = self._least_beside({offer.tenant_id for offer in offers})
        return fill(offers, band, token_budget=token_budget, lead=lead, outside=outside)

    def take(self, parts: Sequence[Part], *, now: float) -> None:
        """Charge these rows to their tenants and jobs; what is left of a microbatch goes on waiting."""
        tenants = {}
        for part in parts:
            tenant = self._tenants[self._entries[part.ticket].waiting.tenant_id]
            tenants[tenant.tenant_id] = tenant
        self._floor = max(self._floor, min(tenant.counter for tenant in tenants.values()))
        for tenant in tenants.values():
            self._leave(tenant)
        for part in parts:
            self._charge(part, now)
        for tenant in tenants.values():
            self._enter(tenant, now)

    def next_ready(self) -> float | None:
        """When the next tenant that its tokens per minute keep back may go."""
        return self._kept_back[0][0] if self._kept_back else None

    def standing(self, ticket: int) -> Standing:
        """Where a waiting microbatch stands. Raises KeyError for one that does not wait."""
        waiting = self._entries[ticket].waiting
        tenant = self._tenants[waiting.tenant_id]
        job = tenant.jobs[waiting.job_id]
        first = self._tenants[self._order.first[2]] if self._order else tenant
        return Standing(
            tenants_ahead=self._order.index(tenant.key) if tenant.key else 0,
            jobs_ahead=tenant.order.index(job.key) if job.key else 0,
            earlier_microbatches=job.tickets.index(ticket),
            ready_at=tenant.ready_at if tenant.kept_back else None,
            tokens_per_minute=tenant.share.tokens_per_minute,
            gang_first=self._head(first).waiting.gang,
            gang=waiting.gang,
        )

    # What may go beside the first

    def _offers(self, of_class: Class, lead: float) -> list[Offer]:
        """The fairest tenants' microbatches of the class: at most LOOK_AHEAD, evenly from the tenants."""
        keys = self._classes[of_class]
        each = max(1, LOOK_AHEAD // len(keys))
        offers, rows = [], 0
        for place, (counter, _, tenant_id) in enumerate(keys):
            if place == LOOK_AHEAD or rows >= LOOK_AHEAD_ROWS:
                break
            tenant = self._tenants[tenant_id]
            microbatches = self._microbatches(tenant, of_class, most=each, lead=lead)
            rows += len(microbatches[0][1]) * len(microbatches) if microbatches else 0
            offers.append(Offer(tenant_id, counter, tenant.share.weight, tenant.rows, microbatches))
        return offers

    def _microbatches(
        self, tenant: _Tenant, of_class: Class, *, most: int, lead: float
    ) -> list[tuple[int, list[Row]]]:
        """Of the tenant's first jobs: none of a lower priority, none further ahead than `lead`."""
        rank, least, ticket, _ = tenant.order.first
        first = self._entries[ticket]
        if most == 1 and first.of_class == of_class:
            return [(ticket, first.rows)]
        found: list[tuple[int, list[Row]]] = []
        for job_rank, counter, ticket, _ in islice(tenant.order, LOOK_AHEAD):
            if job_rank != rank or counter - least > lead or len(found) == most:
                break
            entry = self._entries[ticket]
            if entry.of_class == of_class:
                found.append((ticket, entry.rows))
        return found

    def _least_beside(self, offering: Collection[str]) -> float:
        return next((key[0] for key in self._order if key[2] not in offering), NOBODY)

    # What a tenant has waiting

    def _head(self, tenant: _Tenant) -> _Entry:
        return self._entries[tenant.order.first[2]]

    def _charge(self, part: Part, now: float) -> None:
        entry = self._entries[part.ticket]
        tenant = self._tenants[entry.waiting.tenant_id]
        job, rank = tenant.jobs[entry.waiting.job_id], -entry.waiting.priority
        tenant.floors[rank] = max(tenant.floors.get(rank, 0.0), job.counter)
        self._unplace(tenant, job)
        job.counter += part.tokens
        tenant.counter += part.tokens / tenant.share.weight
        if tenant.share.tokens_per_minute is not None:
            seconds = 60.0 * part.tokens / tenant.share.tokens_per_minute
            tenant.ready_at = max(tenant.ready_at, now) + seconds
        self._drop(tenant, entry, set(part.rows))

    def _drop(self, tenant: _Tenant, entry: _Entry, gone: set[int]) -> None:
        """Rows of a microbatch that no longer wait; the tenant is out of the queue's orders meanwhile."""
        job = tenant.jobs[entry.waiting.job_id]
        self._unplace(tenant, job)
        tenant.rows -= len(gone)
        entry.rows = [row for row in entry.rows if row[1] not in gone]
        if not entry.rows:
            job.tickets.remove(entry.waiting.ticket)
            del self._entries[entry.waiting.ticket]
        self._place(tenant, job)
        if not job.tickets and len(tenant.jobs) > 2 * len(tenant.order) + KEPT_IDLE_JOBS:
            self._forget_idle_jobs(tenant)

    def _place(self, tenant: _Tenant, job: _Job) -> None:
        """Put the job where its oldest microbatch belongs among the tenant's jobs."""
        if job.tickets:
            waiting = self._entries[job.tickets[0]].waiting
            job.key = (-waiting.priority, job.counter, waiting.ticket, job.job_id)
            tenant.order.add(job.key)
            tenant.classes[waiting.of_class] += 1

    def _unplace(self, tenant: _Tenant, job: _Job) -> None:
        if job.key is not None:
            of_class = self._entries[job.key[2]].of_class
            tenant.order.remove(job.key)
            tenant.classes[of_class] -= 1
            if not tenant.classes[of_class]:
                del tenant.classes[of_class]
            job.key = None

    def _forget_idle_jobs(self, tenant: _Tenant) -> None:
        """An idle job at or below the floor of every priority would start there anyway."""
        floor = min(tenant.floors.values(), default=0.0)
        tenant.jobs = {name: job for name, job in tenant.jobs.items() if job.tickets or job.counter > floor}

    # Where a tenant stands among all

    def _enter(self, tenant: _Tenant, now: float) -> None:
        """Take part in the order again, unless nothing waits or the tokens per minute are spent."""
        if not tenant.rows or tenant.kept_back:
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

    def _let_back(self, now: float) -> None:
        while self._kept_back and self._kept_back[0][0] <= now:
            tenant = self._tenants[heapq.heappop(self._kept_back)[1]]
            if tenant.kept_back and tenant.ready_at <= now:
                tenant.kept_back = False
                tenant.counter = max(tenant.counter, self._floor)
                self._enter(tenant, now)


def _longest_first(row: Row) -> Row:
    return -row[0], row[1]
