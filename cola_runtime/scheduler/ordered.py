"""A sorted set of keys: what the fair order is kept in."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=tuple[object, ...])

BUCKET_KEYS = 256  # a full bucket of twice as many is cut in two


class SortedKeys(Generic[Key]):
    """Distinct, comparable keys in ascending order.

    `add`, `remove` and `index` take O(log n) comparisons, beside moving at most 512 references of one bucket
    (a memmove) and, for a cut, one per bucket. Iteration goes from the lowest key and costs what is read.
    """

    def __init__(self) -> None:
        self._buckets: list[list[Key]] = []
        self._highest: list[Key] = []  # of each bucket
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Key]:
        for bucket in self._buckets:
            yield from bucket

    @property
    def first(self) -> Key:
        """The lowest key; there must be one."""
        return self._buckets[0][0]

    def add(self, key: Key) -> None:
        self._count += 1
        if not self._buckets:
            self._buckets, self._highest = [[key]], [key]
            return
        place = min(bisect_left(self._highest, key), len(self._buckets) - 1)
        bucket = self._buckets[place]
        insort(bucket, key)
        if len(bucket) > 2 * BUCKET_KEYS:
            self._buckets[place : place + 1] = bucket[:BUCKET_KEYS], bucket[BUCKET_KEYS:]
            self._highest[place : place + 1] = bucket[BUCKET_KEYS - 1], bucket[-1]
        else:
            self._highest[place] = bucket[-1]

    def remove(self, key: Key) -> None:
        """Raises KeyError."""
        place, position = self._find(key)
        bucket = self._buckets[place]
        del bucket[position]
        self._count -= 1
        if bucket:
            self._highest[place] = bucket[-1]
        else:
            del self._buckets[place], self._highest[place]

    def index(self, key: Key) -> int:
        """How many keys are lower than this one, which must be there."""
        place, position = self._find(key)
        return sum(map(len, self._buckets[:place])) + position

    def _find(self, key: Key) -> tuple[int, int]:
        place = bisect_left(self._highest, key)
        if place < len(self._buckets):
            position = bisect_left(self._buckets[place], key)
            if self._buckets[place][position] == key:
                return place, position
        raise KeyError(key)
