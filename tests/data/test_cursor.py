from __future__ import annotations

from collections import Counter
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_runtime.data.cursor import step_indices, step_rows, steps_per_pass, total_steps
from cola_runtime.errors import InvalidInput
from cola_runtime.rows import Row
from cola_runtime.spec import JobSpec


def spec(**fields: Any) -> JobSpec:
    return JobSpec(name="job", base_model="tiny", **fields)


def flat(row_count: int, job: JobSpec, steps: range) -> list[int]:
    return [index for step in steps for part in step_indices(row_count, job, step) for index in part]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    row_count=st.integers(1, 60),
    rows_per_step=st.integers(1, 16),
    interval=st.integers(1, 16),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_pass_takes_every_row_once_in_full_steps_and_one_rest(
    row_count: int, rows_per_step: int, interval: int, shuffle: bool, seed: int
) -> None:
    interval = min(interval, rows_per_step)
    job = spec(rows_per_step=rows_per_step, adaptation_interval=interval, shuffle=shuffle, seed=seed)
    steps = steps_per_pass(row_count, job)
    for turn in range(3):
        parts = [step_indices(row_count, job, turn * steps + step) for step in range(steps)]
        assert Counter(chain.from_iterable(chain.from_iterable(parts))) == Counter(range(row_count))
        sizes = [sum(map(len, step)) for step in parts]
        assert sizes[:-1] == [rows_per_step] * (steps - 1)
        for step in parts:
            lengths = [len(part) for part in step]
            assert len(step) == min(interval, sum(lengths))
            assert 1 <= min(lengths) <= max(lengths) <= min(lengths) + 1


def test_passes_are_shuffled_anew_and_by_the_seed() -> None:
    orders = [
        flat(100, spec(seed=seed), range(turn * 13, (turn + 1) * 13)) for seed in (0, 1) for turn in (0, 1)
    ]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert all(one != other for one, other in pairwise([*orders, orders[0]]))


def test_the_order_is_the_same_today_and_tomorrow() -> None:
    """Written down once: a change would give resumed jobs other rows than they began with."""
    assert step_indices(10, spec(seed=7, rows_per_step=4), 0) == ((4, 5, 9, 8),)


def test_without_shuffle_rows_come_in_file_order_in_every_pass() -> None:
    job = spec(shuffle=False, rows_per_step=4)
    assert flat(10, job, range(6)) == [*range(10), *range(10)]


def test_the_rest_of_a_pass_is_a_smaller_step_with_fewer_microbatches() -> None:
    job = spec(shuffle=False, rows_per_step=8, adaptation_interval=3)
    assert step_indices(10, job, 0) == ((0, 1, 2), (3, 4, 5), (6, 7))
    assert step_indices(10, job, 1) == ((8,), (9,))


@pytest.mark.parametrize(
    ("fields", "steps"), [({}, 3), ({"passes": 4}, 12), ({"steps": 7}, 7), ({"passes": 1}, 3)]
)
def test_total_steps(fields: dict[str, int], steps: int) -> None:
    assert total_steps(20, spec(rows_per_step=8, **fields)) == steps


def test_too_many_steps_are_refused_with_the_limit() -> None:
    with pytest.raises(InvalidInput) as caught:
        total_steps(100_000, spec(passes=1000, rows_per_step=1))
    assert caught.value.reason == "TOO_MANY_STEPS"
    assert (caught.value.limit, caught.value.actual) == ("1000000", "100000000")


def test_step_rows_gives_the_rows_of_the_indices() -> None:
    rows = [Row(tokens=np.full(2, n, np.int32), weights=np.ones(2, np.float32)) for n in range(10)]
    job = spec(rows_per_step=5, adaptation_interval=2, seed=3)
    found = [[int(row.tokens[0]) for row in part] for part in step_rows(rows, job, 1)]
    assert found == [list(part) for part in step_indices(10, job, 1)]
