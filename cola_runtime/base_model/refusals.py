"""Which segments of a base step cannot be computed, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cola_runtime.adapter_spec import HeadKind
from cola_runtime.rows import Image, Row
from cola_runtime.types import Segment


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
