"""ROUGE-L as Google's `rouge_score` computes it without stemming: how much of a text is in another, in order.

Tokens are the runs of [a-z0-9] of the lower-cased text. With L the longest common subsequence of reference
and answer, F = 2 P R / (P + R) where P = L / tokens of the answer and R = L / tokens of the reference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_TOKEN = re.compile("[a-z0-9]+")


def rouge_l(reference: str, answer: str) -> float:
    """F from 0 to 1; 0 where either text has no tokens."""
    expected, found = _tokens(reference), _tokens(answer)
    common = longest_common_subsequence(expected, found)
    return 2.0 * common / (len(expected) + len(found)) if common else 0.0


def longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Its length. One whole number is a row of the usual table, a zero bit where it grows (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, token in enumerate(left):
        places[token] = places.get(token, 0) | 1 << place
    row = every = (1 << len(left)) - 1
    for token in right:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & every
    return len(left) - row.bit_count()


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())
