"""Which of several sizes are padded to one another. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def near_sizes(sizes: Sequence[int], *, further: int) -> list[list[int]]:
    """Positions of the sizes, in the cheapest parts: each is padded to its largest, and costs `further` more.

    Ascending by size, equal ones in their order, and so the parts. O(n^2) for n different sizes.
    """
    return near_rows([(size, 0) for size in sizes], further=further)


def near_rows(sizes: Sequence[tuple[int, int]], *, further: int) -> list[list[int]]:
    """As `near_sizes`, of rows whose tokens and sources (0: they have none) are padded each for themselves.

    Ascending by the sum of both. Equal sizes are never in several parts.
    """
    alike: dict[tuple[int, int], list[int]] = {}
    for position, size in enumerate(sizes):
        alike.setdefault(size, []).append(position)
    ascending = sorted(alike, key=lambda size: (sum(size), size))
    best, cut = [0], [0]  # of the first n: their least cost, and where the last part begins
    for stop in range(1, len(ascending) + 1):
        tokens = source = rows = 0
        least, begin = -1, 0
        for start in range(stop - 1, -1, -1):
            size = ascending[start]
            tokens, source, rows = max(tokens, size[0]), max(source, size[1]), rows + len(alike[size])
            cost = best[start] + rows * (tokens + source) + further
            if least < 0 or cost <= least:
                least, begin = cost, start
        best.append(least)
        cut.append(begin)
    parts, stop = [], len(ascending)
    while stop:
        parts.append([position for size in ascending[cut[stop] : stop] for position in alike[size]])
        stop = cut[stop]
    return parts[::-1]
