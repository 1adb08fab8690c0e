"""Length bands: the cheapest cuts, against all cuts of small cases."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cola_runtime.scheduler.packing import MOST_LENGTHS, PART_TOKENS, STEP_TOKENS, Band, length_bands

ENTRIES = st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=5), min_size=1, max_size=4)


def cost(bands: list[Band], entries: list[list[int]], budget: int) -> float:
    total = 0.0
    for band in bands:
        inside = [[length for length in entry if length in band] for entry in entries]
        tokens = band.high * sum(map(len, inside))
        total += tokens + STEP_TOKENS * math.ceil(tokens / budget) + PART_TOKENS * sum(map(bool, inside))
    return total


def all_cuts(lengths: list[int]) -> list[list[Band]]:
    found = []
    for count in range(len(lengths)):
        for cuts in combinations(lengths[:-1], count):
            found.append([Band(low, high) for low, high in pairwise([0, *cuts, lengths[-1]])])
    return found


@given(ENTRIES, st.sampled_from([64, 512, 4096]))
def test_no_other_cut_into_bands_is_cheaper(entries: list[list[int]], budget: int) -> None:
    bands = length_bands(entries, token_budget=budget)
    lengths = sorted({length for entry in entries for length in entry})[:9]
    few = [[length for length in entry if length in lengths] for entry in entries]
    few = [entry for entry in few if entry]
    assert sorted(bands, key=lambda band: band.high) == list(reversed(bands)), "longest first"
    assert [band.low for band in bands] == [*(band.high for band in bands[1:]), 0], "without gaps"
    chosen = length_bands(few, token_budget=budget)
    assert cost(chosen, few, budget) <= min(cost(cut, few, budget) for cut in all_cuts(lengths)) + 1e-9


def test_a_row_is_padded_only_where_that_costs_less_than_a_base_step_of_its_own() -> None:
    near = length_bands([[40], [40 - STEP_TOKENS // 2]], token_budget=1000)
    far = length_bands([[140], [140 - 2 * STEP_TOKENS]], token_budget=1000)
    assert (len(near), len(far)) == (1, 2)


def test_many_rows_of_real_spread_are_cut_into_near_lengths() -> None:
    lengths = np.random.default_rng(0).lognormal(3.2, 0.4, (64, 8)).astype(int) + 8
    bands = length_bands(lengths.tolist(), token_budget=1024)
    rows = lengths.ravel()
    computed = sum(band.high * int(((rows > band.low) & (rows <= band.high)).sum()) for band in bands)
    assert 1 - rows.sum() / computed < 0.06
    assert len(bands) <= MOST_LENGTHS
