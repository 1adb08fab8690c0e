"""Rows of images as a tapped model takes them."""

from __future__ import annotations

import numpy as np

from cola_runtime.base_model.model import TappedModel
from cola_runtime.rows import Image, Row

NO_TOKENS, NO_WEIGHTS = np.empty(0, np.int32), np.empty(0, np.float32)


def image_row(tapped: TappedModel, *, seed: int, labels: int) -> Row:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (3, 32, 32), dtype=np.uint8)
    image = Image(pixels=pixels, tokens=tapped.describe("", "").context_length)
    return Row(tokens=NO_TOKENS, weights=NO_WEIGHTS, label=int(random.integers(0, labels)), image=image)
