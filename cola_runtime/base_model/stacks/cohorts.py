"""The stacks of one mixed batch: each cohort's adapters beside each other, for as long as a product lasts.

The bank's vectors are the only lasting copy of an adapter. Where the adapters of several segments run as one
batched product, one input group's blocks are copied together right before, into memory that all groups share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cola_runtime.adapter_spec import input_dropout
from cola_runtime.adapters.dropout import SegmentDropout
from cola_runtime.base_model.segments import Cohort, Member
from cola_runtime.base_model.stacks.protocol import CohortRows, Kept, PartLayout, SiteStack
from cola_runtime.base_model.stacks.taps import GroupTaps
from cola_runtime.base_model.tap_carrier import Recipients, TapOutlet
from cola_runtime.base_model.workspace import Workspace
from cola_runtime.gradients.taps import TapSink
from cola_runtime.rows import Row
from cola_runtime.types import Site

Stacks = dict[int, list[SiteStack]]
"""Input group -> the stacks of every cohort's parts that have sites there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlaces:
    """What is known of the base model's input groups."""

    positions: Mapping[int, int]  # a site's index -> its place within its group
    source_groups: frozenset[int]  # of an encoder-decoder: those whose x is of the source's tokens


def group_stacks(
    cohorts: Sequence[Cohort], places: GroupPlaces, space: Workspace, outlet: TapOutlet | None
) -> Stacks:
    """The stacks of one mixed batch."""
    stacks: Stacks = {}
    for number, cohort in enumerate(cohorts):
        layout = cohort.members[0].adapter.layout
        blocks = [layout.blocks(flat) for flat in gathered_flats(cohort, number, space)]
        scalings, dtypes = part_scalings(cohort, number, space), cohort.gradient_dtypes
        for piece in layout.pieces:
            for group, sites in piece.layout.groups.items():
                of_source = group in places.source_groups
                rows = _rows(cohort, piece.part, of_source=of_source, train=outlet is not None)
                gathered = GatheredStack(
                    piece.layout,
                    tuple(of_segment[piece.blocks] for of_segment in blocks),
                    rows,
                    tuple(places.positions[site.index] for site in sites),
                    None
                    if outlet is None
                    else cohort_taps(cohort, sites[0], scalings[piece.part], dtypes.product, outlet),
                    space,
                )
                lasts = len(blocks) == 1  # views of the bank itself, or of the step's copy of it
                stacks.setdefault(group, []).append(gathered.stack() if lasts else gathered)
    return stacks


@dataclass(frozen=True, slots=True)
class GatheredStack:
    """`SiteStack` of one cohort's adapters of one part at one input group, gathered for each pass anew.

    Twice copying what is about to be read costs less than a percent of a step; keeping the copies would cost
    every resident adapter's memory once more, and more for each size of cohort that it was ever part of.
    """

    layout: PartLayout
    blocks: tuple[Sequence[Tensor], ...]  # of each segment, [P] each; or [S, P] each, of all
    rows: CohortRows
    positions: tuple[int, ...]
    taps: GroupTaps | None
    space: Workspace

    def add_to(self, outputs_BTO: Sequence[Tensor], x_BTI: Tensor) -> Kept:
        return self.stack().add_to(outputs_BTO, x_BTI)

    def backward(self, x_BTI: Tensor, kept: Kept, grads_BTO: Sequence[Tensor], dx_BTI: Tensor | None) -> None:
        self.stack().backward(x_BTI, kept, grads_BTO, dx_BTI)

    def stack(self) -> SiteStack:
        """The kind's own stack; of several segments valid until another one is gathered."""
        (views,) = self.layout.views(self._gathered()).values()
        return self.layout.stack(views, self.rows, self.positions, self.taps)

    def _gathered(self) -> list[Tensor]:
        """The part's blocks, [S, P] each, dense."""
        if len(self.blocks) == 1:
            return [block if block.ndim == 2 else block[None] for block in self.blocks[0]]
        segments, sizes = len(self.blocks), self.layout.block_sizes
        memory = self.space.tensor("gathered", (segments * sum(sizes),), self.blocks[0][0].dtype)
        gathered = memory.split_with_sizes([segments * size for size in sizes])
        dense = [block_P.view(segments, -1) for block_P in gathered]
        for block_SP, parts_P in zip(dense, zip(*self.blocks, strict=True), strict=True):
            torch.stack(parts_P, out=block_SP)
        return dense


def gathered_flats(cohort: Cohort, number: int, space: Workspace) -> tuple[Tensor, ...]:
    """Each adapter's vector [P] in the bank; on a CUDA device one [S, P] in a buffer, for the step.

    There one copy of whole adapters costs less than asking for many small ones, and batched products take
    blocks that are apart.
    """
    flats = [member.adapter.flat for member in cohort.stacked]
    if space.device.type != "cuda":
        return tuple(flats)
    memory_SP = space.tensor(f"cohort{number}", (len(flats), len(flats[0])), flats[0].dtype)
    return (torch.stack(flats, out=memory_SP),)


def part_scalings(cohort: Cohort, number: int, space: Workspace) -> list[Tensor]:
    """Of each part of the adapters: s of every segment, [S], in its gradients' dtype; on CUDA in buffers."""
    values = zip(*(_scalings(member) for member in cohort.stacked), strict=True)
    dtypes = cohort.gradient_dtypes.own
    made = [torch.tensor(of_part, dtype=dtype) for of_part, dtype in zip(values, dtypes, strict=True)]
    if space.device.type != "cuda":
        return made
    return [
        space.tensor(f"cohort{number}.scalings{part}", tuple(scalings_S.shape), scalings_S.dtype).copy_(
            scalings_S.pin_memory(), non_blocking=True
        )
        for part, scalings_S in enumerate(made)
    ]


def _scalings(member: Member) -> list[float]:
    return [part.kind.scaling for part in member.adapter.spec.parts]


def _rows(cohort: Cohort, number: int, *, of_source: bool, train: bool) -> CohortRows:
    """The cohort's rows as one of its parts sees them."""
    return CohortRows(
        cohort.span,
        tuple(member.adapter.spec.parts[number].kind.scaling for member in cohort.stacked),
        _dropouts(cohort, number, of_source=of_source) if train else (),
    )


def _dropouts(cohort: Cohort, number: int, *, of_source: bool) -> tuple[SegmentDropout, ...]:
    """Who draws each segment's masks for the part; none where nothing is dropped (equal within a cohort).

    A site masks the tokens that it sees: the encoder's, and where a decoder attends to it, the source's.
    """
    if not input_dropout(cohort.members[0].adapter.spec.parts[number].kind):
        return ()
    return tuple(
        SegmentDropout(
            dropout=input_dropout(member.adapter.spec.parts[number].kind),
            seed=member.adapter.spec.seed,
            version=member.segment.version,
            rows=member.row_numbers,
            lengths=tuple(_seen(row, of_source=of_source) for row in member.segment.rows),
        )
        for member in cohort.members
    )


def _seen(row: Row, *, of_source: bool) -> int | None:
    """Tokens of the row that the part sees; None for an image, whose positions differ from site to site."""
    if row.image is not None:
        return None
    if not of_source:
        return len(row.tokens)
    assert row.source is not None  # rows without a source are refused
    return len(row.source)


def cohort_taps(
    cohort: Cohort, site: Site, scalings_S: Tensor, product_dtype: torch.dtype, outlet: TapOutlet
) -> GroupTaps:
    """Where the taps of one cohort's part at a site's input group go."""
    return GroupTaps(
        cohort.taps.encoding_of(site.input_group),
        site=site,
        recipients=recipients_of(cohort, outlet.sink),
        scalings_S=scalings_S,
        product_dtype=product_dtype,
        carrier=outlet.carrier,
    )


def recipients_of(cohort: Cohort, sink: TapSink) -> Recipients:
    return Recipients(
        segments=[member.position for member in cohort.members],
        loss_scales=[member.loss_scale for member in cohort.members],
        sink=sink,
    )
