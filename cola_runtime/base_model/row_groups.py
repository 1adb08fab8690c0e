"""Which rows of a mixed batch attend as one rectangle, and the ways there and back.

Everything but attention treats a batch as tokens one after the other. Attention wants rows [R, T, *]: those
that lie in a rectangle already are a view; others are gathered into rectangles of near lengths.
Shapes: N tokens of the batch, R rows of a group, T tokens of its longest, W any width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cola_runtime.base_model.near_sizes import near_sizes
from cola_runtime.base_model.segments import MixedBatch
from cola_runtime.base_model.workspace import Workspace

GROUP_TOKENS = 64  # what a further gathered group costs, in tokens of attention: chosen, not measured


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Where rows that lie anywhere go. Padding reads its own row's first token, and is never written back."""

    sources: Tensor  # int64 [R * T], places in the batch
    padding: Tensor  # int64, places in [R * T]
    real: Tensor  # int64, places in [R * T] of every token
    targets: Tensor  # int64, and where in the batch each belongs


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that attend together, padded on the right: no real token sees what lies behind it."""

    rows: int
    tokens: int
    first: int  # place in the batch, of rows that lie there as a rectangle
    gathered: _Gathered | None

    def read(self, batch_NW: Tensor, space: Workspace, name: str) -> Tensor:
        """[R, T, W]: a view, or a copy in a buffer."""
        if self.gathered is None:
            return self._view(batch_NW)
        width = batch_NW.shape[1]
        out_PW = space.tensor(name, (self.rows * self.tokens, width), batch_NW.dtype)
        torch.index_select(batch_NW, 0, self.gathered.sources, out=out_PW)
        return out_PW.view(self.rows, self.tokens, width)

    def read_gradient(self, grad_NW: Tensor, space: Workspace, name: str) -> Tensor:
        """As `read`; padding has none."""
        out_RTW = self.read(grad_NW, space, name)
        if self.gathered is not None:
            out_RTW.view(-1, grad_NW.shape[1]).index_fill_(0, self.gathered.padding, 0)
        return out_RTW

    def room(self, batch_NW: Tensor, space: Workspace, name: str) -> Tensor:
        """[R, T, W] to be filled and given to `write`: where it belongs, or a buffer."""
        if self.gathered is None:
            return self._view(batch_NW)
        shape = (self.rows, self.tokens, batch_NW.shape[1])
        return space.tensor(name, shape, batch_NW.dtype)

    def write(self, rows_RTW: Tensor, batch_NW: Tensor) -> None:
        """Put every row's tokens back in their places."""
        if self.gathered is not None:
            rows_PW = rows_RTW.view(-1, batch_NW.shape[1])
            real_PW = rows_PW.index_select(0, self.gathered.real) if len(self.gathered.padding) else rows_PW
            batch_NW.index_copy_(0, self.gathered.targets, real_PW)

    def _view(self, batch_NW: Tensor) -> Tensor:
        stop = self.first + self.rows * self.tokens
        return batch_NW[self.first : stop].view(self.rows, self.tokens, -1)


@dataclass(frozen=True, slots=True)
class RowGroups:
    groups: tuple[RowGroup, ...]
    idle: Tensor | None  # int64, places of the batch in no group: nobody's tokens

    def silence(self, batch_NW: Tensor) -> None:
        """In place: nobody's tokens become 0, so that what a buffer held before them reaches nobody."""
        if self.idle is not None:
            batch_NW.index_fill_(0, self.idle, 0)


def row_groups(batch: MixedBatch) -> RowGroups:
    """A rectangular batch is one group; of a flat one each cohort whose segments have one row each."""
    rows, tokens = batch.tokens_BT.shape
    if not batch.flat:
        return RowGroups((RowGroup(rows, tokens, 0, None),), None)
    groups: list[RowGroup] = []
    scattered: list[int] = []  # rows of the others, and their cohorts' tokens
    covered = np.zeros(tokens, np.bool_)
    row = 0
    for cohort in batch.cohorts:
        count = sum(len(member.segment.rows) for member in cohort.members)
        if count == len(cohort.members):
            longest = (cohort.span.stop - cohort.span.first) // count
            groups.append(RowGroup(count, longest, cohort.span.first, None))
            covered[cohort.span.first : cohort.span.stop] = True
        else:
            scattered += range(row, row + count)
        row += count
    starts, lengths = batch.starts, batch.lengths
    for number in scattered:
        covered[starts[number] : starts[number] + lengths[number]] = True
    chosen = np.array(scattered, np.int64)
    for part in near_sizes(lengths[chosen].tolist(), further=GROUP_TOKENS):
        groups.append(_gathering(starts[chosen[part]], lengths[chosen[part]]))
    idle = None if covered.all() else torch.from_numpy(np.flatnonzero(~covered))
    return RowGroups(tuple(groups), idle)


def _gathering(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> RowGroup:
    longest = int(lengths.max())
    steps = np.arange(longest)
    real_RT = steps < lengths[:, None]
    sources_RT = starts[:, None] + np.where(real_RT, steps, 0)
    return RowGroup(
        len(starts),
        longest,
        0,
        _Gathered(
            torch.from_numpy(sources_RT.reshape(-1)),
            torch.from_numpy(np.flatnonzero(~real_RT)),
            torch.from_numpy(np.flatnonzero(real_RT)),
            torch.from_numpy(sources_RT[real_RT]),
        ),
    )
