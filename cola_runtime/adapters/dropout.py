"""LoRA dropout's masks: h = f(x) + s B A (m * x / (1 - p)), m of its own for every row, site and version.

Shapes: L tokens of one row, T of the longest one with its padding, I in_features.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    first_row: int  # of the segment, within its step
    lengths: tuple[
        int | None, ...
    ]  # tokens of each row; None: an image, at every site as long as it is there

    @property
    def factor(self) -> float:
        """1 / (1 - p): keeps the expectation."""
        return 1.0 / (1.0 - self.dropout)

    def mask(self, site: Site, tokens: int) -> Tensor:
        """True where x is kept, [rows * T, I] for `tokens` = T; padding is not."""
        mask = np.zeros((len(self.lengths), tokens, site.in_features), np.bool_)
        least = np.uint32(min(round(self.dropout * 2**32), 2**32 - 1))
        for number, tokens_of_row in enumerate(self.lengths):
            length = tokens if tokens_of_row is None else tokens_of_row
            key = f"dropout/{self.seed}/{self.version}/{self.first_row + number}/{site.name}"
            bits = uniform_bits(key, length * site.in_features)
            np.greater_equal(bits.reshape(length, -1), least, out=mask[number, :length])
        return torch.from_numpy(mask).flatten(0, 1)
