"""A head in an adapter's layout: nothing of it is stacked on a module, so that any two heads stack.

Its weights stay beside the bank's flat vector (`BankedHead`), and the loss applies them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from cola_runtime.base_model.stacks.protocol import CohortRows, Scaled, SiteStack
from cola_runtime.base_model.stacks.taps import GroupTaps
from cola_runtime.types import Site, TensorKey


class HeadLayout:
    """`PartLayout` without blocks and without groups."""

    def __init__(self) -> None:
        self.groups: dict[int, tuple[Site, ...]] = {}
        self.block_sizes: tuple[int, ...] = ()

    def scaled(self, weights: Mapping[TensorKey, Tensor], kind: Any) -> list[Scaled]:
        return []

    def views(self, blocks: Sequence[Tensor]) -> dict[int, Any]:
        return {}

    def stack(
        self, views: Any, rows: CohortRows, positions: tuple[int, ...], taps: GroupTaps | None
    ) -> SiteStack:
        raise AssertionError("a head has no input group in the base model")
