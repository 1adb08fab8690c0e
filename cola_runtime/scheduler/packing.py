"""Splits a microbatch that is too large for one base step. Pure.

Splitting changes nobody's gradient: every row carries the loss denominator of its whole step, so the
parts' gradients add up to the step's (README, "The numbered life of a step").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cola_runtime.types import Row


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


def split_rows(rows: Sequence[Row], *, token_budget: int) -> list[tuple[Row, ...]]:
    """Cut rows, in order, into parts of at most `token_budget` padded tokens; a longer row is one part."""
    parts: list[list[Row]] = []
    padded = PaddedRow()
    for row in rows:
        grown = padded.beside(_of(row))
        if parts and (len(parts[-1]) + 1) * grown.total <= token_budget:
            parts[-1].append(row)
            padded = grown
        else:
            parts.append([row])
            padded = _of(row)
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


def _of(row: Row) -> PaddedRow:
    return PaddedRow(row.length - row.source_length, row.source_length)
