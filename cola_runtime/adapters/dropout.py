"""LoRA dropout's masks: h = f(x) + s B A (m * x / (1 - p)), m of its own for every row, site and version.

Shapes: L tokens of one row, T of the longest one with its padding, I in_features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from cola_runtime.adapters.numpy_draws import uniform_bits
from cola_runtime.types import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentDropout:
    """Draws the masks of one segment's rows.

    An entry depends on the adapter's seed, its version, the row's number within the step, the site's name,
    the token's position and the feature: on nothing else. So the same step has the same masks whatever it is
    mixed with, padded to or split into, and when it is computed again after a fault.
    """

    dropout: float  # p, the share of entries that is zeroed
    seed: int
    version: int
    rows: tuple[int, ...]  # each one's number within the step
    lengths: tuple[int | None, ...]  # of each, tokens; None: an image, at every site as long as it is there

    @property
    def factor(self) -> float:
        """1 / (1 - p): keeps the expectation."""
        return 1.0 / (1.0 - self.dropout)

    def mask(self, site: Site, tokens: int) -> Tensor:
        """True where x is kept, [rows * T, I] for `tokens` = T; padding is not."""
        starts = range(0, len(self.lengths) * tokens, tokens)
        lengths = [tokens if length is None else length for length in self.lengths]
        return self._placed(site, starts, lengths, len(self.lengths) * tokens)

    def line_mask(self, site: Site, tokens: int) -> Tensor:
        """Of rows end to end, padded behind the last one to `tokens` = M: [M, I]."""
        lengths = [length for length in self.lengths if length is not None]
        return self._placed(site, accumulate(lengths[:-1], initial=0), lengths, tokens)

    def _placed(self, site: Site, starts: Iterable[int], lengths: Sequence[int], places: int) -> Tensor:
        """[places, I]: each row's entries from its start on."""
        mask = np.zeros((places, site.in_features), np.bool_)
        least = np.uint32(min(round(self.dropout * 2**32), 2**32 - 1))
        for row, start, length in zip(self.rows, starts, lengths, strict=True):
            key = f"dropout/{self.seed}/{self.version}/{row}/{site.name}"
            bits = uniform_bits(key, length * site.in_features)
            np.greater_equal(bits.reshape(length, -1), least, out=mask[start : start + length])
        return torch.from_numpy(mask)
