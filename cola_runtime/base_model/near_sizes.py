"""Which of several sizes are padded to one another. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def near_sizes(sizes: Sequence[int], *, further: int) -> list[list[int]]:
    """Positions of the sizes, in the cheapest parts: each is padded to its largest, and costs `further` more.

    Ascending by size, equal ones in their order, and so the parts. O(n^2) additions for n sizes.
    """
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    best, cut = [0], [0]  # of the first n: their least cost, and where the last part begins
    for stop in range(1, len(order) + 1):
        largest = sizes[order[stop - 1]]
        costs = [best[start] + (stop - start) * largest + further for start in range(stop)]
        least = min(costs)
        best.append(least)
        cut.append(costs.index(least))
    parts, stop = [], len(order)
    while stop:
        parts.append(order[cut[stop] : stop])
        stop = cut[stop]
    return parts[::-1]
