"""Which rows go together: cuts the lengths of what waits into bands, so that little is padding. Pure.

Sending rows of one microbatch in different base steps changes nobody's gradient: every row carries the loss
denominator of its whole step, so the parts' gradients add up to the step's.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STEP_TOKENS = 64  # what a further base step costs, in computed tokens (docs/scheduling.md)
PART_TOKENS = 4  # what a further part of a microbatch costs: its taps travel once more
MOST_LENGTHS = 20  # that are told apart, evenly by their logarithm; others count as the next longer one
_EVENLY = np.linspace(0.0, 1.0, MOST_LENGTHS)


@dataclass(frozen=True, slots=True)
class Band:
    """Rows with low < length <= high may share a base step."""

    low: int
    high: int

    def __contains__(self, length: int) -> bool:
        return self.low < length <= self.high


def length_bands(entries: Sequence[Sequence[int]], *, token_budget: int) -> list[Band]:
    """Cut the lengths of all rows of `entries` (microbatches) into the cheapest bands, longest first.

    A band of n rows up to length h costs n * h tokens, STEP_TOKENS per base step that it fills, and
    PART_TOKENS per microbatch with rows in it. So a row is padded only where that costs less than a base step
    and a part of its own. O(rows + entries * lengths^2) with at most MOST_LENGTHS lengths.
    """
    lengths_R = np.array([length for entry in entries for length in entry])
    tops_U = _told_apart(lengths_R)
    entry_R = np.repeat(np.arange(len(entries)), [len(entry) for entry in entries])
    costs = _band_costs(tops_U, np.searchsorted(tops_U, lengths_R), entry_R, token_budget)
    return _cheapest_cuts(tops_U.tolist(), costs)


def _told_apart(lengths_R: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ascending lengths, the longest among them, that the others are rounded up to."""
    sorted_R = np.sort(lengths_R)
    firsts_R = np.flatnonzero(sorted_R[1:] != sorted_R[:-1])
    if len(firsts_R) < MOST_LENGTHS:
        return np.append(sorted_R[firsts_R], sorted_R[-1])
    shortest, longest = float(sorted_R[0]), float(sorted_R[-1])
    edges_U = shortest * (longest / shortest) ** _EVENLY
    edges_U[-1] = longest
    return np.unique(sorted_R[np.searchsorted(sorted_R, edges_U, side="right") - 1])


def _band_costs(
    tops_U: NDArray[np.int64], of_row_R: NDArray[np.int64], entry_R: NDArray[np.int64], token_budget: int
) -> list[list[float]]:
    """[last length, first length] -> tokens that the band between them costs."""
    lengths = len(tops_U)
    before_U = np.concatenate([[0], np.cumsum(np.bincount(of_row_R, minlength=lengths))])
    rows_UU = before_U[1:, None] - before_U[None, :-1]
    newest_EU = np.full((int(entry_R[-1]) + 1, lengths), -1)
    newest_EU[entry_R, of_row_R] = of_row_R
    newest_EU = np.maximum.accumulate(newest_EU, axis=1)
    parts_UU = (newest_EU[:, :, None] >= np.arange(lengths)).sum(axis=0)
    tokens_UU = rows_UU * tops_U[:, None]
    costs_UU = tokens_UU - STEP_TOKENS * (-tokens_UU // token_budget) + PART_TOKENS * parts_UU
    costs: list[list[float]] = costs_UU.tolist()
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
