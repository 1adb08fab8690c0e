"""What goes together: cuts a microbatch that is too large for one base step, and finds near lengths. Pure.

Splitting changes nobody's gradient: every row carries the loss denominator of its whole step, so the
parts' gradients add up to the step's (README, "The numbered life of a step").
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cola_runtime.rows import Row

STEP_TOKENS = 64  # what a further base step costs, in computed tokens (docs/scheduling.md)
MOST_LENGTHS = 20  # that are told apart, evenly by their logarithm; others count as the next longer one
_EVENLY = np.linspace(0.0, 1.0, MOST_LENGTHS)


@dataclass(frozen=True, slots=True)
class PaddedRow:
    """What one row costs in a rectangular batch: tokens of the longest row, and of the longest source."""

    tokens: int = 0
    source: int = 0  # of encoder-decoders, which pad both for themselves

    @property
    def total(self) -> int:
        return self.tokens + self.source

    def beside(self, other: PaddedRow) -> PaddedRow:
        """In one batch."""
        return PaddedRow(max(self.tokens, other.tokens), max(self.source, other.source))


def padded_row(rows: Sequence[Row]) -> PaddedRow:
    """Of these rows in a batch of their own."""
    padded = PaddedRow()
    for row in rows:
        padded = padded.beside(_of(row))
    return padded


def measured(rows: Sequence[Row], *, unpadded: bool) -> tuple[int, PaddedRow]:
    """What rows are in a base step: so many, and what each costs beside no longer ones.

    Where they are not padded: as many as they have tokens, of one token each.
    """
    return (sum(row.length for row in rows), PaddedRow(1)) if unpadded else (len(rows), padded_row(rows))


def split_rows(rows: Sequence[Row], *, token_budget: int, unpadded: bool = False) -> list[tuple[Row, ...]]:
    """Cut rows, in order, into parts of at most `token_budget` computed tokens; a longer row is one part."""
    parts: list[list[Row]] = []
    count, padded = 0, PaddedRow()
    for row in rows:
        further, size = measured([row], unpadded=unpadded)
        grown = padded.beside(size)
        if parts and (count + further) * grown.total <= token_budget:
            parts[-1].append(row)
            count, padded = count + further, grown
        else:
            parts.append([row])
            count, padded = further, size
    return [tuple(part) for part in parts]


def first_prompts(
    prompts: Sequence[Sequence[int]], *, new_tokens: int, token_budget: int
) -> Sequence[Sequence[int]]:
    """The first prompts, one at least, that with `new_tokens` each are at most `token_budget` padded."""
    longest = 0
    for count, prompt in enumerate(prompts):
        longest = max(longest, len(prompt))
        if count and (count + 1) * (longest + new_tokens) > token_budget:
            return prompts[:count]
    return prompts


@dataclass(frozen=True, slots=True)
class Band:
    """Microbatches whose padded rows have low < length <= high may share a base step."""

    low: int
    high: int

    def __contains__(self, length: int) -> bool:
        return self.low < length <= self.high


def length_bands(lengths: Sequence[int], rows: Sequence[int], *, token_budget: int) -> list[Band]:
    """Cut the lengths of microbatches (of a padded row, each), with so many rows each, into the cheapest
    bands, longest first.

    A band of n rows up to length h costs n * h tokens, and STEP_TOKENS per base step that it fills. So a
    microbatch is padded only where that costs less than a base step of its own. O(microbatches + lengths^2)
    with at most MOST_LENGTHS lengths.
    """
    rows_of: dict[int, int] = {}
    for length, count in zip(lengths, rows, strict=True):
        rows_of[length] = rows_of.get(length, 0) + count
    ascending = sorted(rows_of)
    tops = _told_apart(ascending)
    up_to, before = 0, [0]  # rows shorter than, or as long as, each of the tops
    for length in ascending:
        up_to += rows_of[length]
        if length == tops[len(before) - 1]:
            before.append(up_to)
    return _cheapest_cuts(tops, before, token_budget)


def _of(row: Row) -> PaddedRow:
    return PaddedRow(row.length - row.source_length, row.source_length)


def _told_apart(ascending: list[int]) -> list[int]:
    """Ascending lengths, the longest among them, that the others are rounded up to."""
    if len(ascending) <= MOST_LENGTHS:
        return ascending
    shortest, longest = float(ascending[0]), float(ascending[-1])
    edges: list[float] = (shortest * (longest / shortest) ** _EVENLY).tolist()
    edges[-1] = longest
    return sorted({ascending[bisect_right(ascending, edge) - 1] for edge in edges})


def _cheapest_cuts(tops: list[int], before: list[int], token_budget: int) -> list[Band]:
    """`before[n]` rows are no longer than the n lowest tops. Of bands of equal cost the longest is taken."""
    best, cuts = [0], list[int]()
    own = [0]  # tokens of the n lowest without padding: no cut of them costs less
    for last, top in enumerate(tops):
        own.append(own[last] + (before[last + 1] - before[last]) * top)
        least, cut = -1, last
        for first in range(last, -1, -1):
            tokens = (before[last + 1] - before[first]) * top
            cost = tokens - STEP_TOKENS * (-tokens // token_budget)
            if least < 0 or best[first] + cost <= least:
                least, cut = best[first] + cost, first
            elif own[first] + cost > least:
                break  # and so does every longer band
        best.append(least)
        cuts.append(cut)
    bands, last = [], len(tops) - 1
    while last >= 0:
        first = cuts[last]
        bands.append(Band(tops[first - 1] if first else 0, tops[last]))
        last = first - 1
    return bands
