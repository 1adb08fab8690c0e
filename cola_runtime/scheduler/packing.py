"""What goes together: cuts a microbatch that is too large for one base step, and finds near lengths. Pure.

Splitting changes nobody's gradient: every row carries the loss denominator of its whole step, so the
parts' gradients add up to the step's (README, "The numbered life of a step").
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cola_runtime.types import Row

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


def measured(rows: Sequence[Row], *, flat: bool) -> tuple[int, PaddedRow]:
    """What rows are in a base step: so many, and what each costs beside no longer ones.

    In a flat batch rows lie end to end: as many as they have tokens, of one token each.
    """
    return (sum(row.length for row in rows), PaddedRow(1)) if flat else (len(rows), padded_row(rows))


def split_rows(rows: Sequence[Row], *, token_budget: int, flat: bool = False) -> list[tuple[Row, ...]]:
    """Cut rows, in order, into parts of at most `token_budget` computed tokens; a longer row is one part."""
    parts: list[list[Row]] = []
    count, padded = 0, PaddedRow()
    for row in rows:
        further, size = measured([row], flat=flat)
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
    lengths_M = np.array(lengths)
    tops_U = _told_apart(lengths_M)
    of_top_M = np.searchsorted(tops_U, lengths_M)
    rows_U = np.bincount(of_top_M, weights=rows, minlength=len(tops_U)).astype(np.int64)
    return _cheapest_cuts(tops_U.tolist(), _band_costs(tops_U, rows_U, token_budget))


def _of(row: Row) -> PaddedRow:
    return PaddedRow(row.length - row.source_length, row.source_length)


def _told_apart(lengths_M: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ascending lengths, the longest among them, that the others are rounded up to."""
    sorted_M = np.sort(lengths_M)
    firsts_M = np.flatnonzero(sorted_M[1:] != sorted_M[:-1])
    if len(firsts_M) < MOST_LENGTHS:
        return np.append(sorted_M[firsts_M], sorted_M[-1])
    shortest, longest = float(sorted_M[0]), float(sorted_M[-1])
    edges_U = shortest * (longest / shortest) ** _EVENLY
    edges_U[-1] = longest
    return np.unique(sorted_M[np.searchsorted(sorted_M, edges_U, side="right") - 1])


def _band_costs(tops_U: NDArray[np.int64], rows_U: NDArray[np.int64], token_budget: int) -> list[list[float]]:
    """[last length, first length] -> tokens that the band between them costs."""
    before_U = np.concatenate([[0], np.cumsum(rows_U)])
    tokens_UU = (before_U[1:, None] - before_U[None, :-1]) * tops_U[:, None]
    costs: list[list[float]] = (tokens_UU - STEP_TOKENS * (-tokens_UU // token_budget)).tolist()
    return costs


def _cheapest_cuts(tops: list[int], costs: list[list[float]]) -> list[Band]:
    best: list[float] = [0]
    cut = []
    for to_last in costs:
        with_first = [*map(operator.add, best, to_last)]  # as many as `best` has
        best.append(min(with_first))
        cut.append(with_first.index(best[-1]))
    bands, last = [], len(tops) - 1
    while last >= 0:
        first = cut[last]
        bands.append(Band(tops[first - 1] if first else 0, tops[last]))
        last = first - 1
    return bands
