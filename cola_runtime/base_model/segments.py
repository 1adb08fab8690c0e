"""Composes one batch out of many tenants' rows.

Segments of equal (adapter layout, tap plan) and as many padded tokens become neighbours, a *cohort*: their
adapters run as one batched product over views.
A rectangular batch has rows padded on the right to the longest: under causal attention no real token sees
padding, bidirectional attention masks it by the rows' lengths. A flat one has all rows end to end in one line
(B = 1), and pads only the segments of one cohort, to the longest of them: a body must tell its rows apart.
Shapes: B rows of the batch, T padded length, P = B * T places, K label positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cola_runtime.adapter_spec import AdapterSpec
from cola_runtime.base_model.accelerator import HOST, Accelerator
from cola_runtime.base_model.bank import BankedAdapter
from cola_runtime.base_model.near_sizes import near_sizes
from cola_runtime.base_model.stacks.protocol import Span
from cola_runtime.encodings import TapPlan
from cola_runtime.gradients.travelling_dtypes import own_gradient_dtype, product_dtype
from cola_runtime.rows import Image, Row
from cola_runtime.types import UNSCALED, Segment

COHORT_TOKENS = 32  # what a further cohort costs a flat batch, in computed tokens (docs/performance.md)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientDtypes:
    """In which dtypes an adapter's gradients travel."""

    own: tuple[torch.dtype, ...]  # of each part, under `adapter_gradient`
    product: torch.dtype  # under `weight_gradient`

    @staticmethod
    def of(spec: AdapterSpec, base_dtype: torch.dtype, *, loss_scaled: bool = False) -> GradientDtypes:
        base = str(base_dtype).removeprefix("torch.")
        own = [
            own_gradient_dtype(part.kind, base=base, adapter=spec.dtype, loss_scaled=loss_scaled)
            for part in spec.parts
        ]
        product = product_dtype(base=base, adapter=spec.dtype, loss_scaled=loss_scaled)
        return GradientDtypes(
            own=tuple(getattr(torch, dtype) for dtype in own), product=getattr(torch, product)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One accepted segment of the step and its adapter."""

    position: int  # in BaseStep.segments
    segment: Segment
    adapter: BankedAdapter
    loss_scale: float = 1.0  # what this pass multiplies the segment's loss by
    numbers: tuple[int, ...] | None = None  # of a part of the segment: its rows' positions within the step

    @property
    def row_numbers(self) -> tuple[int, ...]:
        """Each row's position within the step; dropout's masks go by it."""
        if self.numbers is not None:
            return self.numbers
        first = self.segment.first_row
        return tuple(range(first, first + len(self.segment.rows)))

    def part(self, places: Sequence[int]) -> Member:
        """Some of the rows, which count as before: for the segment's loss, and for what is drawn for them."""
        numbers, rows = self.row_numbers, self.segment.rows
        return replace(
            self,
            segment=replace(self.segment, rows=tuple(rows[place] for place in places)),
            numbers=tuple(numbers[place] for place in places),
        )

    @property
    def loss_denominator(self) -> float:
        """What a pass divides the segment's sum of losses by."""
        return self.segment.loss_denominator / self.loss_scale

    @property
    def gradient_dtypes(self) -> GradientDtypes:
        scaled = self.segment.loss_scaling != UNSCALED
        return GradientDtypes.of(self.adapter.spec, self.adapter.flat.dtype, loss_scaled=scaled)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """Segments that stack: equal layout, tap plan, dtypes and padded tokens; contiguous in the batch."""

    members: tuple[Member, ...]
    span: Span
    ghosts: int = 0  # places behind the members' that are nobody's: no label, no tap

    @property
    def stacked(self) -> tuple[Member, ...]:
        """The members, and at nobody's places the first one again: weights must lie there, whosever."""
        return self.members + self.members[:1] * self.ghosts

    @property
    def taps(self) -> TapPlan:
        return self.members[0].segment.taps

    @property
    def gradient_dtypes(self) -> GradientDtypes:
        return self.members[0].gradient_dtypes


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
    flat: bool
    starts: NDArray[np.int64]  # of each row, its first token's place
    lengths: NDArray[np.int64]  # of each row, tokens
    token_types_BT: Tensor | None  # int64, padded with 0; None: all 0
    sources: Sources | None  # of an encoder-decoder
    images_BCHW: Tensor | None  # uint8, of an image classifier, whose rows have no tokens
    image_tokens: int  # of all images together
    cohorts: tuple[Cohort, ...]
    labels: Labels

    @property
    def computed_tokens(self) -> int:
        """Padding included."""
        sources = 0 if self.sources is None else self.sources.tokens_BS.numel()
        return self.tokens_BT.numel() + sources + self.image_tokens

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(member for cohort in self.cohorts for member in cohort.members)


def as_it_is(longest: int) -> int:
    """Rows are padded to the longest and no further."""
    return longest


def no_ghosts(_members: Sequence[Member]) -> int:
    return 0


def mixed_batch(
    members: Sequence[Member],
    accelerator: Accelerator = HOST,
    *,
    flat: bool = False,
    padded_length: Callable[[int], int] = as_it_is,
    ghosts: Callable[[Sequence[Member]], int] = no_ghosts,
) -> MixedBatch:
    """Order the segments into cohorts (stably: equal compositions give equal batches) and place their rows.

    `flat`: rows of text end to end, for a body that tells them apart. `padded_length`: to how many tokens the
    rows of a rectangle, or the segments of a cohort laid flat, for the longest one's. `ghosts`: how many
    segments more a rectangle has room for behind a cohort's members.
    """
    places = _flat(members, padded_length) if flat else _rectangle(members, padded_length, ghosts)
    ordered = [member for cohort in places.cohorts for member in cohort.members]
    rows = [row for member in ordered for row in member.segment.rows]
    types_BT = _token_types(rows, places.shape)
    images_BCHW = _images([row.image for row in rows if isinstance(row.image, Image)])
    tokens_P, labels = _labelled(ordered, places, accelerator)
    return MixedBatch(
        tokens_BT=accelerator.placed(torch.from_numpy(tokens_P).view(places.shape)),
        flat=flat,
        starts=places.starts,
        lengths=np.array([len(row.tokens) for row in rows]),
        token_types_BT=None if types_BT is None else accelerator.placed(types_BT),
        sources=_sources([row.source for row in rows if row.source is not None], accelerator),
        images_BCHW=None if images_BCHW is None else accelerator.placed(images_BCHW),
        image_tokens=sum(row.image.tokens for row in rows if row.image is not None),
        cohorts=places.cohorts,
        labels=labels,
    )


@dataclass(frozen=True, slots=True)
class _Places:
    """Where everything lies; rows in the order of the cohorts' members."""

    cohorts: tuple[Cohort, ...]
    starts: NDArray[np.int64]
    shape: tuple[int, int]  # B, T


def _rectangle(
    members: Sequence[Member],
    padded_length: Callable[[int], int],
    ghosts: Callable[[Sequence[Member]], int],
) -> _Places:
    """A cohort's segments have equally many rows, so that each is as many padded tokens."""
    buckets: dict[object, list[Member]] = {}
    for member in members:
        buckets.setdefault((*_stacking_key(member), len(member.segment.rows)), []).append(member)
    cohorts: list[Cohort] = []
    real: list[int] = []  # rows that are somebody's
    row = 0
    for bucket in buckets.values():
        of_each, extra = len(bucket[0].segment.rows), ghosts(bucket)
        real += range(row, row + of_each * len(bucket))
        stop = row + of_each * (len(bucket) + extra)
        cohorts.append(Cohort(members=tuple(bucket), span=Span(row, stop), ghosts=extra))
        row = stop
    longest = padded_length(max(len(row.tokens) for member in members for row in member.segment.rows))
    return _Places(tuple(cohorts), np.array(real, np.int64) * longest, (row, longest))


def _flat(members: Sequence[Member], padded_length: Callable[[int], int]) -> _Places:
    """A cohort's segments are of near sizes, and padded behind their last rows."""
    buckets: dict[object, list[Member]] = {}
    for member in members:
        buckets.setdefault(_stacking_key(member), []).append(member)
    cohorts: list[Cohort] = []
    starts: list[int] = []
    place = 0
    for bucket in buckets.values():
        sizes = [sum(len(row.tokens) for row in member.segment.rows) for member in bucket]
        for part in near_sizes(sizes, further=COHORT_TOKENS):
            first, longest = place, padded_length(max(sizes[number] for number in part))
            for number in part:
                lengths = [len(row.tokens) for row in bucket[number].segment.rows]
                starts += (place + start for start in accumulate(lengths[:-1], initial=0))
                place += longest
            in_part = tuple(bucket[number] for number in part)
            cohorts.append(Cohort(members=in_part, span=Span(first, place, of_tokens=True)))
    return _Places(tuple(cohorts), np.array(starts), (1, place))


def _stacking_key(member: Member) -> tuple[object, ...]:
    return member.adapter.layout, member.segment.taps, member.adapter.spec.dtype, member.gradient_dtypes


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


def _labelled(
    members: Sequence[Member], places: _Places, accelerator: Accelerator
) -> tuple[NDArray[np.int64], Labels]:
    """Tokens [P], and which of them are labels."""
    size = places.shape[0] * places.shape[1]
    tokens_P, owners_P = np.zeros(size, np.int64), np.zeros(size, np.int64)
    weights_P = np.zeros(size, np.float64)
    rows = ((owner, row) for owner, member in enumerate(members) for row in member.segment.rows)
    for start, (owner, row) in zip(places.starts, rows, strict=True):
        stop = start + len(row.tokens)
        tokens_P[start:stop] = row.tokens
        owners_P[start:stop] = owner
        if row.label is None:
            weights_P[start + 1 : stop] = row.weights[1:]  # nothing predicts a row's first token
    labels_K = np.flatnonzero(weights_P)
    weights_K, owners_K = weights_P[labels_K], owners_P[labels_K]
    denominators = np.array([member.loss_denominator for member in members], np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # a zero denominator spoils its own rows only
        scales_K = weights_K / denominators[owners_K]
    return tokens_P, Labels(
        positions_K=accelerator.placed(torch.from_numpy(labels_K - 1)),
        targets_K=accelerator.placed(torch.from_numpy(tokens_P[labels_K])),
        weights_K=torch.from_numpy(weights_K),
        scales_K=accelerator.placed(torch.from_numpy(scales_K)),
        counts=tuple(np.bincount(owners_K, minlength=len(members)).tolist()),
    )
