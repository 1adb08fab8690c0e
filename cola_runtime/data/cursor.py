"""Which rows an optimizer step sees: a pure function of spec and step, computed without the steps before it.

A pass takes every row once, `rows_per_step` a step; the last step of a pass may be smaller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cola_runtime.errors import InvalidInput
from cola_runtime.rows import Row
from cola_runtime.spec import MAX_STEPS, JobSpec


def steps_per_pass(row_count: int, spec: JobSpec) -> int:
    return -(-row_count // spec.rows_per_step)


def total_steps(row_count: int, spec: JobSpec) -> int:
    """Optimizer steps of the whole job; neither `steps` nor `passes` means one pass.

    Raises InvalidInput `TOO_MANY_STEPS` above `MAX_STEPS`.
    """
    if spec.steps is not None:
        return spec.steps
    steps = (spec.passes or 1) * steps_per_pass(row_count, spec)
    if steps > MAX_STEPS:
        raise InvalidInput(
            "TOO_MANY_STEPS",
            f"{spec.passes} passes over {row_count} rows are too many steps",
            where="job.passes",
            limit=MAX_STEPS,
            actual=steps,
            remedy="Ask for fewer passes, or for more rows_per_step.",
        )
    return steps


def step_indices(row_count: int, spec: JobSpec, step: int) -> tuple[tuple[int, ...], ...]:
    """The microbatches, as row numbers, of the step that takes version `step` to version `step + 1`.

    Sizes of a step's microbatches differ by at most one; none is empty, so a small last step may have fewer.
    """
    turn, position = divmod(step, steps_per_pass(row_count, spec))
    return _microbatches(_order(row_count, spec, turn), spec, position)


def step_rows(rows: Sequence[Row], spec: JobSpec, step: int) -> list[list[Row]]:
    """`step_indices` with the rows themselves."""
    return [[rows[index] for index in part] for part in step_indices(len(rows), spec, step)]


def walked_steps(rows: Sequence[Row], spec: JobSpec, steps: int) -> Iterator[list[list[Row]]]:
    """`step_rows` of the first `steps` steps, each pass's order drawn once."""
    per_pass = steps_per_pass(len(rows), spec)
    for step in range(steps):
        turn, position = divmod(step, per_pass)
        if position == 0:
            order = _order(len(rows), spec, turn)
        yield [[rows[index] for index in part] for part in _microbatches(order, spec, position)]


def _microbatches(order: NDArray[np.int64], spec: JobSpec, position: int) -> tuple[tuple[int, ...], ...]:
    start = position * spec.rows_per_step
    rows = order[start : start + spec.rows_per_step]
    parts = np.array_split(rows, min(spec.adaptation_interval, len(rows)))
    return tuple(tuple(part.tolist()) for part in parts)


def _order(row_count: int, spec: JobSpec, turn: int) -> NDArray[np.int64]:
    """The order of pass `turn`, drawn anew from (seed, turn).

    From RandomState, whose stream NumPy has frozen (NEP 19): a job resumes alike under a newer NumPy.
    """
    if not spec.shuffle:
        return np.arange(row_count)
    bits = np.random.MT19937(np.random.SeedSequence([spec.seed, turn]))
    return np.random.RandomState(bits).permutation(row_count)
