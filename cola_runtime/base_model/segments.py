"""Composes one rectangular batch out of many tenants' rows.

Segments of equal (adapter layout, rows, tap plan) become neighbours, a *cohort*: their adapters run as one
batched product over views. Rows are padded on the right: under causal attention no real token sees padding.
Shapes: B rows of the batch, T padded length, K label positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cola_runtime.base_model.bank import BankedAdapter
from cola_runtime.types import Row, Segment, TapPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One accepted segment of the step and its adapter."""

    position: int  # in BaseStep.segments
    segment: Segment
    adapter: BankedAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """Segments that stack: equal layout, rows, tap plan and wire dtype; contiguous in the batch."""

    members: tuple[Member, ...]
    first_row: int

    @property
    def rows_per_segment(self) -> int:
        return len(self.members[0].segment.rows)

    @property
    def stop_row(self) -> int:
        return self.first_row + len(self.members) * self.rows_per_segment

    @property
    def taps(self) -> TapPlan:
        return self.members[0].segment.taps


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Which positions of the flattened batch predict a label. Position p predicts the token at p + 1."""

    positions_K: Tensor  # int64, ascending, in [0, B*T)
    targets_K: Tensor  # int64
    weights_K: Tensor  # float64
    scales_K: Tensor  # float64: weight / loss_denominator, the loss's derivative by the cross-entropy
    counts: tuple[int, ...]  # per member, in batch order


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedBatch:
    tokens_BT: Tensor  # int64, padded with 0
    cohorts: tuple[Cohort, ...]
    labels: Labels

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(member for cohort in self.cohorts for member in cohort.members)


def mixed_batch(members: Sequence[Member]) -> MixedBatch:
    """Order the segments into cohorts (stably: equal compositions give equal batches) and pad their rows."""
    buckets: dict[object, list[Member]] = {}
    for member in members:
        buckets.setdefault(_stacking_key(member), []).append(member)
    cohorts, row = [], 0
    for bucket in buckets.values():
        cohorts.append(Cohort(members=tuple(bucket), first_row=row))
        row = cohorts[-1].stop_row
    ordered = [member for bucket in buckets.values() for member in bucket]
    rows = [row for member in ordered for row in member.segment.rows]
    tokens, weights = _padded(rows)
    return MixedBatch(
        tokens_BT=torch.from_numpy(tokens), cohorts=tuple(cohorts), labels=_labels(ordered, tokens, weights)
    )


def _stacking_key(member: Member) -> object:
    segment, adapter = member.segment, member.adapter
    return adapter.layout, len(segment.rows), segment.taps, adapter.spec.dtype


def _padded(rows: Sequence[Row]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    longest = max(len(row.tokens) for row in rows)
    tokens = np.zeros((len(rows), longest), np.int64)
    weights = np.zeros((len(rows), longest), np.float64)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = row.tokens
        weights[number, 1 : len(row.tokens)] = row.weights[1:]
    return tokens, weights


def _labels(members: Sequence[Member], tokens: NDArray[np.int64], weights: NDArray[np.float64]) -> Labels:
    row, column = np.nonzero(weights)
    rows_of = [len(member.segment.rows) for member in members]
    denominators = np.repeat([member.segment.loss_denominator for member in members], rows_of)
    label_weights = weights[row, column]
    per_row = np.count_nonzero(weights, axis=1)
    counts = np.add.reduceat(per_row, np.cumsum([0, *rows_of[:-1]]))
    with np.errstate(divide="ignore", invalid="ignore"):  # a zero denominator spoils its own rows only
        scales = label_weights / denominators[row]
    return Labels(
        positions_K=torch.from_numpy(row * tokens.shape[1] + column - 1),
        targets_K=torch.from_numpy(tokens[row, column]),
        weights_K=torch.from_numpy(label_weights),
        scales_K=torch.from_numpy(scales),
        counts=tuple(int(count) for count in counts),
    )


def row_refusal(rows: Sequence[Row], *, vocabulary_size: int, context_length: int) -> str | None:
    """`ROW_INVALID` if a row is empty, too long or holds a token that the base model has no embedding for."""
    if not rows:
        return "ROW_INVALID"
    for row in rows:
        tokens = row.tokens
        if not 0 < len(tokens) <= context_length or len(row.weights) != len(tokens):
            return "ROW_INVALID"
        if tokens.min() < 0 or tokens.max() >= vocabulary_size:
            return "ROW_INVALID"
    return None
