"""Splits a microbatch that is too large for one base step. Pure.

Splitting changes nobody's gradient: every row carries the loss denominator of its whole step, so the
parts' gradients add up to the step's (README, "The numbered life of a step").
"""

from __future__ import annotations

from collections.abc import Sequence

from cola_runtime.types import Row


def split_rows(rows: Sequence[Row], *, token_budget: int) -> list[tuple[Row, ...]]:
    """Cut rows, in order, into parts of at most `token_budget` padded tokens; a longer row is one part."""
    parts: list[list[Row]] = []
    longest = 0
    for row in rows:
        grown = max(longest, row.length)
        if parts and (len(parts[-1]) + 1) * grown <= token_budget:
            parts[-1].append(row)
            longest = grown
        else:
            parts.append([row])
            longest = row.length
    return [tuple(part) for part in parts]


def longest_row(rows: Sequence[Row]) -> int:
    return max(row.length for row in rows)
