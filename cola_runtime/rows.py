"""One row of a dataset as the base model takes it: tokens, or an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """A checked PNG or JPEG, as it was sent, where that is smaller; the base model's service decodes it."""

    content: bytes
    tokens: int  # what the base model computes for it: BaseModelDescription.context_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image as the base model takes it, but for the normalisation of its values."""

    pixels: NDArray[np.uint8]  # [channels, height, width]
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One tokenised training row. `weights[t]` weighs the loss of predicting `tokens[t]` (0: not a label).

    A row with a `label` is judged as a whole, by the adapter's head, with weight 1.
    """

    tokens: NDArray[np.int32]  # [length]
    weights: NDArray[np.float32]  # [length]; weights[0] is always 0, nothing predicts the first token
    label: int | float | None = None  # a class from 0, or a value; `weights` is empty then
    token_types: NDArray[np.int8] | None = None  # [length], of a pair of texts; None is 0 throughout
    source: NDArray[np.int32] | None = None  # an encoder-decoder's input; `tokens` are its decoder's
    image: Image | EncodedImage | None = None  # instead of tokens, which are empty then

    @property
    def source_length(self) -> int:
        return 0 if self.source is None else len(self.source)

    @property
    def length(self) -> int:
        """Tokens that the base model computes for the row."""
        if self.image is not None:
            return self.image.tokens
        return len(self.tokens) + self.source_length

    @property
    def label_tokens(self) -> int:
        return int(np.count_nonzero(self.weights)) if self.label is None else 1

    @property
    def loss_weight(self) -> float:
        """What the row adds to the loss denominator of its step."""
        return float(self.weights.sum()) if self.label is None else 1.0
