"""The stacked weights of cohorts, kept from step to step, and the stacks of one mixed batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cola_runtime.adapter_spec import input_dropout
from cola_runtime.adapters.adapter import torch_dtype
from cola_runtime.adapters.dropout import SegmentDropout
from cola_runtime.base_model.layout import AdapterLayout
from cola_runtime.base_model.segments import Cohort
from cola_runtime.base_model.stacks.protocol import CohortRows, SiteStack
from cola_runtime.base_model.stacks.taps import GroupTaps
from cola_runtime.gradients.taps import TapSink

Stacks = dict[int, list[SiteStack]]
"""Input group -> the stacks of every cohort's parts that have sites there."""


class StackCache:
    """Stacked blocks of the cohorts of past steps; a step whose adapters did not change copies nothing.

    One slot per (layout, segments, ordinal): a member's new version replaces its old one in place. `limit`
    slots are kept, the least recently used goes first.
    """

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._slots: dict[tuple[AdapterLayout, int, int], _Slot] = {}

    def views(self, cohort: Cohort, ordinal: int) -> list[dict[int, Any]]:
        """Per part: input group -> views. `ordinal` tells equal-shaped cohorts of one batch apart."""
        key = (cohort.members[0].adapter.layout, len(cohort.members), ordinal)
        slot = self._slots.pop(key, None) or _Slot(cohort)
        self._slots[key] = slot
        while len(self._slots) > self._limit:
            del self._slots[next(iter(self._slots))]
        slot.refresh(cohort)
        return slot.views


class _Slot:
    """Dense blocks for one shape of cohort, and what is stacked in them now."""

    def __init__(self, cohort: Cohort) -> None:
        first = cohort.members[0].adapter
        members = len(cohort.members)
        self._sizes = first.layout.block_sizes
        memory = first.flat.new_empty(members * sum(self._sizes))
        blocks = [
            block.view(members, -1) for block in torch.split(memory, [members * size for size in self._sizes])
        ]
        self._rows = list(zip(*(block.split(1) for block in blocks), strict=True))  # type: ignore[no-untyped-call]
        self._held: list[Tensor | None] = [None] * members
        self.views = first.layout.views(blocks)

    def refresh(self, cohort: Cohort) -> None:
        """Copy in the members whose version is another than the one held; no temporary, no more copies."""
        for place, member in enumerate(cohort.members):
            flat = member.adapter.flat
            if self._held[place] is not flat:
                torch.split_with_sizes_copy(flat[None], self._sizes, dim=1, out=self._rows[place])
                self._held[place] = flat


def group_stacks(
    cohorts: Sequence[Cohort], positions: Mapping[int, int], cache: StackCache, sink: TapSink | None
) -> Stacks:
    """The stacks of one mixed batch. `positions` maps a site's index to its place within its group."""
    stacks: Stacks = {}
    counts: dict[tuple[AdapterLayout, int], int] = {}
    for cohort in cohorts:
        adapter = cohort.members[0].adapter
        if not adapter.layout.block_sizes:
            continue  # a head alone
        shape = (adapter.layout, len(cohort.members))
        ordinal = counts[shape] = counts.get(shape, -1) + 1
        views = cache.views(cohort, ordinal)
        for number, (part, of_part) in enumerate(zip(adapter.layout.parts, views, strict=True)):
            scalings = tuple(member.adapter.spec.parts[number].kind.scaling for member in cohort.members)
            dropouts = () if sink is None else _dropouts(cohort, number)
            rows = CohortRows(cohort.first_row, cohort.stop_row, scalings, dropouts)
            for group, of_group in of_part.items():
                taps = None if sink is None else cohort_taps(cohort, group, scalings, sink)
                places = tuple(positions[site.index] for site in part.groups[group])
                stacks.setdefault(group, []).append(part.stack(of_group, rows, places, taps))
    return stacks


def _dropouts(cohort: Cohort, number: int) -> tuple[SegmentDropout, ...]:
    """Who draws each segment's masks for the part; none where nothing is dropped (equal within a cohort)."""
    if not input_dropout(cohort.members[0].adapter.spec.parts[number].kind):
        return ()
    return tuple(
        SegmentDropout(
            dropout=input_dropout(member.adapter.spec.parts[number].kind),
            seed=member.adapter.spec.seed,
            version=member.segment.version,
            rows=tuple(map(member.segment.row_number, range(len(member.segment.rows)))),
            lengths=tuple(len(row.tokens) for row in member.segment.rows),
        )
        for member in cohort.members
    )


def cohort_taps(cohort: Cohort, group: int, scalings: tuple[float, ...], sink: TapSink) -> GroupTaps:
    """Where the taps of one cohort's part at an input group go."""
    return GroupTaps(
        cohort.taps.encoding_of(group),
        segments=[member.position for member in cohort.members],
        scalings=scalings,
        dtype=torch_dtype(cohort.members[0].adapter.spec),
        sink=sink,
    )
