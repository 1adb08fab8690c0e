"""Composes one rectangular batch out of many tenants' rows.

Segments of equal (adapter layout, rows, tap plan) become neighbours, a *cohort*: their adapters run as one
batched product over views. Rows are padded on the right: under causal attention no real token sees padding,
bidirectional attention masks it by the rows' lengths.
Shapes: B rows of the batch, T padded length, K label positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cola_runtime.adapter_spec import HeadKind
from cola_runtime.base_model.accelerator import HOST, Accelerator
from cola_runtime.base_model.bank import BankedAdapter
from cola_runtime.types import Image, Row, Segment, TapPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One accepted segment of the step and its adapter."""

    position: int  # in BaseStep.segments
    segment: Segment
    adapter: BankedAdapter
    loss_scale: float = 1.0  # what this pass multiplies the segment's loss by

    @property
    def loss_denominator(self) -> float:
        """What a pass divides the segment's sum of losses by."""
        return self.segment.loss_denominator / self.loss_scale


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
    weights_K: Tensor  # float64, in host memory, where the sums are made
    scales_K: Tensor  # float64: weight / loss_denominator, the scaled loss's derivative by the cross-entropy
    counts: tuple[int, ...]  # per member, in batch order


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What the encoder of an encoder-decoder reads; S is the longest source."""

    tokens_BS: Tensor  # int64, padded with 0
    real_BS: Tensor  # int64: 1, and 0 at the padding


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedBatch:
    tokens_BT: Tensor  # int64, padded with 0
    lengths_B: Tensor  # int64
    token_types_BT: Tensor | None  # int64, padded with 0; None: all 0
    sources: Sources | None  # of an encoder-decoder
    images_BCHW: Tensor | None  # uint8, of an image classifier, whose rows have no tokens
    image_tokens: int  # of all images together
    cohorts: tuple[Cohort, ...]
    labels: Labels

    @property
    def computed_tokens(self) -> int:
        """Rows times padded length."""
        sources = 0 if self.sources is None else self.sources.tokens_BS.numel()
        return self.tokens_BT.numel() + sources + self.image_tokens

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(member for cohort in self.cohorts for member in cohort.members)

    @property
    def placed_members(self) -> Iterator[tuple[Member, int]]:
        """Every member and its first row, in batch order."""
        for cohort in self.cohorts:
            for number, member in enumerate(cohort.members):
                yield member, cohort.first_row + number * cohort.rows_per_segment


def mixed_batch(
    members: Sequence[Member],
    accelerator: Accelerator = HOST,
    *,
    padded_length: Callable[[int], int] = lambda longest: longest,
) -> MixedBatch:
    """Order the segments into cohorts (stably: equal compositions give equal batches) and pad their rows.

    `padded_length`: to how many tokens, for the longest row's.
    """
    buckets: dict[object, list[Member]] = {}
    for member in members:
        buckets.setdefault(_stacking_key(member), []).append(member)
    cohorts, row = [], 0
    for bucket in buckets.values():
        cohorts.append(Cohort(members=tuple(bucket), first_row=row))
        row = cohorts[-1].stop_row
    ordered = [member for bucket in buckets.values() for member in bucket]
    rows = [row for member in ordered for row in member.segment.rows]
    tokens, weights = _padded(rows, padded_length)
    types_BT = _token_types(rows, tokens.shape)
    images_BCHW = _images([row.image for row in rows if isinstance(row.image, Image)])
    return MixedBatch(
        tokens_BT=accelerator.placed(torch.from_numpy(tokens)),
        lengths_B=accelerator.placed(torch.tensor([len(row.tokens) for row in rows])),
        token_types_BT=None if types_BT is None else accelerator.placed(types_BT),
        sources=_sources([row.source for row in rows if row.source is not None], accelerator),
        images_BCHW=None if images_BCHW is None else accelerator.placed(images_BCHW),
        image_tokens=sum(row.image.tokens for row in rows if row.image is not None),
        cohorts=tuple(cohorts),
        labels=_labels(ordered, tokens, weights, accelerator),
    )


def _stacking_key(member: Member) -> object:
    segment, adapter = member.segment, member.adapter
    return adapter.layout, len(segment.rows), segment.taps, adapter.spec.dtype


def _padded(
    rows: Sequence[Row], padded_length: Callable[[int], int]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    longest = padded_length(max(len(row.tokens) for row in rows))
    tokens = np.zeros((len(rows), longest), np.int64)
    weights = np.zeros((len(rows), longest), np.float64)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = row.tokens
        if row.label is None:
            weights[number, 1 : len(row.tokens)] = row.weights[1:]
    return tokens, weights


def _sources(sources: Sequence[NDArray[np.int32]], accelerator: Accelerator) -> Sources | None:
    if not sources:
        return None
    shape = len(sources), max(map(len, sources))
    tokens_BS, real_BS = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for number, source in enumerate(sources):
        tokens_BS[number, : len(source)] = torch.from_numpy(source)
        real_BS[number, : len(source)] = 1
    return Sources(tokens_BS=accelerator.placed(tokens_BS), real_BS=accelerator.placed(real_BS))


def _images(images: Sequence[Image]) -> Tensor | None:
    return torch.from_numpy(np.stack([image.pixels for image in images])) if images else None


def _token_types(rows: Sequence[Row], shape: tuple[int, ...]) -> Tensor | None:
    if all(row.token_types is None for row in rows):
        return None
    types_BT = torch.zeros(shape, dtype=torch.int64)
    for number, row in enumerate(rows):
        if row.token_types is not None:
            types_BT[number, : len(row.token_types)] = torch.from_numpy(row.token_types)
    return types_BT


def _labels(
    members: Sequence[Member],
    tokens: NDArray[np.int64],
    weights: NDArray[np.float64],
    accelerator: Accelerator,
) -> Labels:
    row, column = np.nonzero(weights)
    rows_of = [len(member.segment.rows) for member in members]
    denominators = np.repeat([member.loss_denominator for member in members], rows_of)
    label_weights = weights[row, column]
    per_row = np.count_nonzero(weights, axis=1)
    counts = np.add.reduceat(per_row, np.cumsum([0, *rows_of[:-1]]))
    with np.errstate(divide="ignore", invalid="ignore"):  # a zero denominator spoils its own rows only
        scales = label_weights / denominators[row]
    return Labels(
        positions_K=accelerator.placed(torch.from_numpy(row * tokens.shape[1] + column - 1)),
        targets_K=accelerator.placed(torch.from_numpy(tokens[row, column])),
        weights_K=torch.from_numpy(label_weights),
        scales_K=accelerator.placed(torch.from_numpy(scales)),
        counts=tuple(int(count) for count in counts),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLimits:
    """What a base model can embed and predict."""

    vocabulary_size: int
    context_length: int
    token_types: int  # how many it has an embedding for; 0 where it has none
    causal: bool  # it predicts tokens
    encoder_decoder: bool  # its rows have a source
    image_shape: tuple[int, int, int] | None  # its rows are images [channels, height, width]


def row_refusal(rows: Sequence[Row], limits: RowLimits, head: HeadKind | None) -> str | None:
    """`ROW_INVALID` if a row is empty, too long, holds what the base model has no embedding for, or has no
    label that the adapter's head, or else the vocabulary, could be judged by.
    """
    valid = rows and all(_embeddable(row, limits) and _judged(row, limits, head) for row in rows)
    return None if valid else "ROW_INVALID"


def _embeddable(row: Row, limits: RowLimits) -> bool:
    if limits.image_shape is not None or row.image is not None:
        return _is_image(row, limits)
    tokens, types = row.tokens, row.token_types
    if (row.source is not None) != limits.encoder_decoder:
        return False
    texts = [tokens] if row.source is None else [tokens, row.source]
    if not all(0 < len(text) <= limits.context_length for text in texts):
        return False
    if not all(0 <= text.min() <= text.max() < limits.vocabulary_size for text in texts):
        return False
    return types is None or (
        len(types) == len(tokens) and 0 <= types.min() <= types.max() < limits.token_types
    )


def _is_image(row: Row, limits: RowLimits) -> bool:
    image = row.image
    texts = (row.token_types, row.source)
    return (
        isinstance(image, Image)
        and len(row.tokens) == 0
        and all(text is None for text in texts)
        and image.pixels.dtype == np.uint8
        and image.pixels.shape == limits.image_shape
        and image.tokens == limits.context_length
    )


def _judged(row: Row, limits: RowLimits, head: HeadKind | None) -> bool:
    if head is None or row.label is None:
        return limits.causal and head is None and row.label is None and len(row.weights) == len(row.tokens)
    if head.problem == "regression":
        return math.isfinite(row.label)
    return isinstance(row.label, int) and 0 <= row.label < head.labels


def one_gang(segments: Sequence[Segment], refusals: Sequence[str | None]) -> list[str | None]:
    """The refusals, and `GANG_MIXED` for what needs other merged weights than the first segment without one.

    That is another gang, or a member in another version than in its first segment.
    """
    served = [segment for segment, refusal in zip(segments, refusals, strict=True) if refusal is None]
    versions = {segment.lease.job_id: segment.version for segment in reversed(served)}

    def fits(segment: Segment) -> bool:
        same = segment.gang is None or segment.version == versions[segment.lease.job_id]
        return segment.gang == served[0].gang and same

    return [
        "GANG_MIXED" if refusal is None and not fits(segment) else refusal
        for segment, refusal in zip(segments, refusals, strict=True)
    ]
