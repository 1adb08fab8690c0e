"""Fills a base step with microbatches of one band so that nobody runs ahead of who has to wait. Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from cola_runtime.scheduler.packing import STEP_TOKENS, Band, PaddedRow
from cola_runtime.scheduler.waiting import Waiting

NOBODY = math.inf  # `outside` when every waiting tenant has an offer


@dataclass(slots=True)
class Offer:
    """What one tenant could put into the base step."""

    tenant_id: str
    counter: float
    weight: float
    waits: int  # microbatches of the tenant, in all
    microbatches: list[Waiting]  # in the order of the tenant's jobs


@dataclass(slots=True)
class _Filling:
    token_budget: float
    rows: int = 0
    padded: PaddedRow = field(default_factory=PaddedRow)
    chosen: list[Waiting] = field(default_factory=list)

    @property
    def is_full(self) -> bool:
        return (self.rows + 1) * self.padded.total > self.token_budget

    def has_room(self, waiting: Waiting) -> bool:
        """Within the budget, and padding less than a base step of its own. The first always has room."""
        computed = (self.rows + waiting.rows) * self.padded.beside(waiting.padded).total
        padding = computed - self.rows * self.padded.total - waiting.padded_tokens
        return not self.rows or (computed <= self.token_budget and padding <= STEP_TOKENS)

    def take(self, waiting: Waiting) -> None:
        self.rows += waiting.rows
        self.padded = self.padded.beside(waiting.padded)
        self.chosen.append(waiting)


def fill(
    offers: Sequence[Offer], band: Band, *, token_budget: float, lead: float, outside: float
) -> tuple[Waiting, ...]:
    """Microbatches of the band, always from the tenant that would then be least served, up to the budget.

    A tenant stops `lead` tokens of its own ahead of the least counter among those that go on waiting:
    (counter - least) * weight <= lead before each microbatch. `outside` is that counter among tenants without
    an offer (infinity: there are none). Offers come in fair order; the first one's first microbatch is in the
    band and is taken, also above the budget. One that has no room when its turn comes stays behind.
    """
    filling = _Filling(token_budget)
    heap = [(offer.counter, place) for place, offer in enumerate(offers)]
    in_band = [[w for w in offer.microbatches if w.padded.total in band][::-1] for offer in offers]
    while heap and not filling.is_full:
        counter, place = heapq.heappop(heap)
        offer, pending, took = offers[place], in_band[place], False
        least = min(outside, heap[0][0]) if heap else outside
        while pending and (counter - least) * offer.weight <= lead:
            waiting = pending.pop()
            if filling.has_room(waiting):
                filling.take(waiting)
                counter += waiting.tokens / offer.weight
                offer.waits, took = offer.waits - 1, True
        if pending and took and heap:
            heapq.heappush(heap, (counter, place))  # its turn may come again when others have caught up
        elif offer.waits:
            outside = min(outside, counter)
    return tuple(filling.chosen)
