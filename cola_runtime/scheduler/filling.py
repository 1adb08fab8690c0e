"""Fills a base step with rows of one band so that nobody runs ahead of who has to wait. Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from cola_runtime.scheduler.packing import Band
from cola_runtime.scheduler.waiting import Part

Row = tuple[int, int]  # tokens, number within the microbatch


@dataclass(slots=True)
class Offer:
    """What one tenant could put into the base step."""

    tenant_id: str
    counter: float
    weight: float
    waiting_rows: int  # of the tenant, in all
    microbatches: list[tuple[int, list[Row]]]
    """(ticket, rows, longest first), in the order of the tenant's jobs."""


@dataclass(slots=True)
class _Filling:
    token_budget: int
    rows: int = 0
    longest: int = 0
    parts: dict[int, list[Row]] = field(default_factory=dict)  # by ticket

    @property
    def is_full(self) -> bool:
        return (self.rows + 1) * self.longest > self.token_budget

    def has_room(self, length: int) -> bool:
        """The first row always has, also above the budget."""
        return not self.rows or (self.rows + 1) * max(self.longest, length) <= self.token_budget

    def take(self, ticket: int, length: int, row: int) -> None:
        self.rows += 1
        self.longest = max(self.longest, length)
        self.parts.setdefault(ticket, []).append((length, row))


def fill(
    offers: Sequence[Offer], band: Band, *, token_budget: int, lead: float, outside: float
) -> tuple[Part, ...]:
    """Rows of the band, always from the tenant that would then be least served, up to the budget.

    A tenant stops `lead` tokens of its own ahead of the least counter among those that go on waiting:
    (counter - least) * weight <= lead before each row. `outside` is that counter among tenants without an
    offer (infinity: there are none). Offers come in fair order; the first row of the first one is taken.
    """
    filling = _Filling(token_budget)
    heap = [(offer.counter, place) for place, offer in enumerate(offers)]
    pending: dict[int, list[tuple[int, int, int]]] = {}
    while heap and not filling.is_full:
        counter, place = heapq.heappop(heap)
        offer = offers[place]
        rows = pending.get(place) or _rows(offer, band)
        before, least = len(rows), min(outside, heap[0][0]) if heap else outside
        while rows and (counter - least) * offer.weight <= lead and filling.has_room(rows[-1][1]):
            filling.take(*rows[-1])
            counter += rows.pop()[1] / offer.weight
        taken = before - len(rows)
        offer.waiting_rows -= taken
        if rows and taken and heap:
            pending[place] = rows
            heapq.heappush(heap, (counter, place))  # its turn may come again when others have caught up
        elif offer.waiting_rows:
            outside = min(outside, counter)
    return tuple(_part(ticket, taken) for ticket, taken in filling.parts.items())


def _rows(offer: Offer, band: Band) -> list[tuple[int, int, int]]:
    """(ticket, length, row) of those in the band, the first one last."""
    low, high = band.low, band.high
    return [
        (ticket, length, row)
        for ticket, rows in reversed(offer.microbatches)
        for length, row in reversed(rows)
        if low < length <= high
    ]


def _part(ticket: int, taken: list[Row]) -> Part:
    lengths = [length for length, _ in taken]
    return Part(
        ticket=ticket,
        rows=tuple(sorted([row for _, row in taken])),
        tokens=sum(lengths),
        longest=lengths[0],
    )


NOBODY = math.inf  # `outside` when every waiting tenant has an offer
