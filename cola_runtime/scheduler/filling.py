"""Fills a base step with microbatches of one band so that nobody runs ahead of who has to wait. Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cola_runtime.scheduler.packing import STEP_TOKENS, Band
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


class _Filling:
    """A base step that is being filled."""

    def __init__(self, token_budget: float) -> None:
        self._budget = token_budget
        self._rows = self._tokens = self._source = 0  # rows, and what each costs (PaddedRow)
        self.chosen: list[Waiting] = []

    @property
    def is_full(self) -> bool:
        return (self._rows + 1) * (self._tokens + self._source) > self._budget

    def took(self, waiting: Waiting) -> bool:
        """Take it if there is room: within the budget, and padding less than a base step of its own.

        The first always has room.
        """
        tokens, source = max(self._tokens, waiting.padded.tokens), max(self._source, waiting.padded.source)
        computed = (self._rows + waiting.rows) * (tokens + source)
        padding = computed - self._rows * (self._tokens + self._source) - waiting.padded_tokens
        if self._rows and (computed > self._budget or padding > STEP_TOKENS):
            return False
        self._rows, self._tokens, self._source = self._rows + waiting.rows, tokens, source
        self.chosen.append(waiting)
        return True


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
    low, high, pending = band.low, band.high, []
    heap: list[tuple[float, int]] = []
    for place, offer in enumerate(offers):
        pending.append([w for w in reversed(offer.microbatches) if low < w.padded.total <= high])
        if pending[-1]:
            heap.append((offer.counter, place))  # in fair order, which is a heap
        else:
            outside = min(outside, offer.counter)
    while heap and not filling.is_full:
        counter, place = heapq.heappop(heap)
        offer, mine, took = offers[place], pending[place], False
        least = min(outside, heap[0][0]) if heap else outside
        while mine and (counter - least) * offer.weight <= lead:
            waiting = mine.pop()
            if filling.took(waiting):
                counter += waiting.tokens / offer.weight
                offer.waits, took = offer.waits - 1, True
        if mine and took and heap:
            heapq.heappush(heap, (counter, place))  # its turn may come again when others have caught up
        elif offer.waits:
            outside = min(outside, counter)
    return tuple(filling.chosen)
