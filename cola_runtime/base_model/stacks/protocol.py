"""What every adapter kind gives the base model: where its weights lie in the bank, and how they stack.

Shapes: B rows, T tokens, S segments of a cohort, M tokens of one segment, F features, P numbers of one block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from cola_runtime.adapters.dropout import SegmentDropout
from cola_runtime.base_model.stacks.taps import GroupTaps
from cola_runtime.types import Site, TensorKey

Kept = tuple[Tensor, ...]
"""What a stack's forward leaves for its backward."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where a cohort lies in the batch."""

    first: int
    stop: int
    of_tokens: bool = False  # counted in tokens of a flat batch, else in rows


@dataclass(frozen=True, slots=True)
class CohortRows:
    """Where in the mixed batch a cohort lies, and in how many equal segments."""

    span: Span
    scalings: tuple[float, ...]  # s of each segment
    dropouts: tuple[SegmentDropout, ...] = ()  # of each segment, where the part drops inputs in this step

    @property
    def segments(self) -> int:
        return len(self.scalings)

    def of(self, tensor_BTF: Tensor) -> Tensor:
        """The cohort's tokens as [S, M, F], a view; also of a tensor that is a slice of columns."""
        first, stop = self.span.first, self.span.stop
        if not self.span.of_tokens:
            return tensor_BTF[first:stop].view(self.segments, -1, tensor_BTF.shape[-1])
        # Asked for hundreds of times a step: one view, not three.
        tokens, (_, row, column) = (stop - first) // self.segments, tensor_BTF.stride()
        return tensor_BTF.as_strided(
            (self.segments, tokens, tensor_BTF.shape[-1]),
            (tokens * row, row, column),
            tensor_BTF.storage_offset() + first * row,
        )


class SiteStack(Protocol):
    """One cohort's adapters of one part at one input group.

    A cohort is a slice of rows, never a mask, so a NaN in one tenant's adapter cannot reach its neighbours.
    """

    def add_to(self, outputs_BTO: Sequence[Tensor], x_BTI: Tensor) -> Kept:
        """In place: outputs += s * a(x), `outputs` being those of all the group's sites."""

    def backward(self, x_BTI: Tensor, kept: Kept, grads_BTO: Sequence[Tensor], dx_BTI: Tensor | None) -> None:
        """In place: dx += the gradient through s * a(x). Hands out the taps."""


class Scaled(NamedTuple):
    """A weight as a block holds it: `tensor`, line by line, times `by`."""

    tensor: Tensor
    by: float = 1.0


class PartLayout(Protocol):
    """One part of an adapter: its weights as consecutive blocks of one vector.

    Adapters whose layouts are the same object stack. What may differ between them (alpha, a seed) is folded
    into the blocks by `scaled`.
    """

    groups: dict[int, tuple[Site, ...]]  # input group -> the part's sites there, in catalogue order
    block_sizes: tuple[int, ...]

    def scaled(self, weights: Mapping[TensorKey, Tensor], kind: Any) -> list[Scaled]:
        """What lies in the blocks, in their order, in the adapter's dtype; maybe `weights` themselves, which
        `AdapterLayout.flatten` copies and scales for all parts at once.
        """

    def views(self, blocks: Sequence[Tensor]) -> dict[int, Any]:
        """Input group -> views of `blocks`: [S, P] each, contiguous."""

    def stack(
        self, views: Any, rows: CohortRows, positions: tuple[int, ...], taps: GroupTaps | None
    ) -> SiteStack:
        """`positions`: of the adapted sites among the group's. No taps in a forward-only step."""


def by_input_group(sites: Sequence[Site]) -> dict[int, tuple[Site, ...]]:
    """Input group -> its sites, both in ascending order."""
    ordered = sorted(sites, key=lambda site: (site.input_group, site.index))
    groups = groupby(ordered, key=lambda site: site.input_group)
    return {number: tuple(members) for number, members in groups}
