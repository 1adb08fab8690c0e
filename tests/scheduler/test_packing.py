"""Near lengths: the cheapest cuts, against all cuts of small cases. Parts of what is above the budget."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cola_runtime.rows import Row
from cola_runtime.scheduler.packing import (
    MOST_LENGTHS,
    STEP_TOKENS,
    Band,
    PaddedRow,
    first_prompts,
    length_bands,
    padded_row,
    split_rows,
)

MICROBATCHES = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 5)), min_size=1, max_size=12)


def cost(bands: list[Band], microbatches: list[tuple[int, int]], budget: int) -> float:
    total = 0.0
    for band in bands:
        tokens = band.high * sum(rows for length, rows in microbatches if length in band)
        total += tokens + STEP_TOKENS * math.ceil(tokens / budget)
    return total


def all_cuts(lengths: list[int]) -> list[list[Band]]:
    found = []
    for count in range(len(lengths)):
        for cuts in combinations(lengths[:-1], count):
            found.append([Band(low, high) for low, high in pairwise([0, *cuts, lengths[-1]])])
    return found


def bands_of(microbatches: list[tuple[int, int]], budget: int) -> list[Band]:
    lengths, rows = zip(*microbatches, strict=True)
    return length_bands(lengths, rows, token_budget=budget)


@given(MICROBATCHES, st.sampled_from([64, 512, 4096]))
def test_no_other_cut_into_bands_is_cheaper(microbatches: list[tuple[int, int]], budget: int) -> None:
    bands = bands_of(microbatches, budget)
    lengths = sorted({length for length, _ in microbatches})[:9]
    few = [each for each in microbatches if each[0] in lengths]
    assert sorted(bands, key=lambda band: band.high) == list(reversed(bands)), "longest first"
    assert [band.low for band in bands] == [*(band.high for band in bands[1:]), 0], "without gaps"
    chosen = bands_of(few, budget)
    assert cost(chosen, few, budget) <= min(cost(cut, few, budget) for cut in all_cuts(lengths)) + 1e-9


def test_a_microbatch_is_padded_only_where_that_costs_less_than_a_base_step_of_its_own() -> None:
    near = bands_of([(40, 2), (40 - STEP_TOKENS // 4, 2)], 1000)
    far = bands_of([(140, 2), (140 - STEP_TOKENS, 2)], 1000)
    assert (len(near), len(far)) == (1, 2)


def test_many_microbatches_of_real_spread_are_cut_into_near_lengths() -> None:
    lengths = np.random.default_rng(0).lognormal(3.2, 0.4, 400).astype(int) + 8
    bands = length_bands(lengths.tolist(), [8] * 400, token_budget=1024)
    computed = sum(band.high * int(((lengths > band.low) & (lengths <= band.high)).sum()) for band in bands)
    assert 1 - lengths.sum() / computed < 0.06
    assert len(bands) <= MOST_LENGTHS


def row(length: int) -> Row:
    return Row(tokens=np.zeros(length, np.int32), weights=np.ones(length, np.float32))


def pair(source: int, target: int) -> Row:
    tokens = np.zeros(target, np.int32)
    return Row(tokens=tokens, weights=np.ones(target, np.float32), source=np.zeros(source, np.int32))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_split_rows_keeps_every_row_once_in_order_and_under_the_budget(
    lengths: list[int], budget: int
) -> None:
    rows = [row(length) for length in lengths]
    parts = split_rows(rows, token_budget=budget)
    assert [r for part in parts for r in part] == rows
    for part in parts:
        padded = len(part) * max(len(r.tokens) for r in part)
        assert padded <= budget or len(part) == 1


def test_sources_and_targets_are_padded_each_to_their_longest() -> None:
    rows = [pair(30, 2), pair(4, 10), pair(30, 10)]
    assert padded_row(rows[:2]) == PaddedRow(10, 30)
    assert split_rows(rows, token_budget=79) == [(rows[0],), (rows[1],), (rows[2],)]
    assert split_rows(rows, token_budget=80) == [(rows[0], rows[1]), (rows[2],)]


def test_prompts_are_answered_in_parts_of_the_budget() -> None:
    prompts = [[0] * length for length in (4, 6, 6, 50)]
    assert list(first_prompts(prompts, new_tokens=4, token_budget=20)) == prompts[:2]
    assert list(first_prompts(prompts, new_tokens=4, token_budget=3)) == prompts[:1]
    assert list(first_prompts(prompts[3:], new_tokens=4, token_budget=20)) == prompts[3:]
