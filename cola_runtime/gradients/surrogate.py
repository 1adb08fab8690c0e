"""ColA's surrogate after the first inner step: functional gradient descent on kept taps, not exact training.

Per site, with w0 the weights that a tap (x, g) was taken at, the surrogate is

    1/2 |s a_w(x) - (s a_w0(x) - g)|^2,    summed over the tap's rows,

whose gradient at w is the vector-Jacobian product of s a_w(x) with r = s a_w(x) - s a_w0(x) + g. At w = w0
that is the exact gradient; later it pulls the adapter's output towards s a_w0(x) - g while the base model
stands still. The target s a_w0(x) - g is never formed, as that would round away a small g.
Shapes: N rows, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cola_runtime.adapters.site_adapter import SiteAdapter, Weights
from cola_runtime.errors import QuotaExceeded
from cola_runtime.types import TensorKey

MAX_KEPT_BYTES = 1 << 30
"""Most bytes of one adapter's taps in one step: for each of its rows, I per input and O per site."""


class KeptTaps:
    """The pairs (x, g) of the step under way; sites that share an x share its memory."""

    def __init__(self, adapters: Mapping[int, SiteAdapter]) -> None:
        self._adapters = adapters
        self._pairs: list[tuple[SiteAdapter, Tensor, Tensor]] = []
        self._bytes = 0

    def reserve(self, tensor_bytes: int) -> None:
        """Count a tensor that will be kept. Raises QuotaExceeded TAPS_TOO_LARGE above `MAX_KEPT_BYTES`."""
        if self._bytes + tensor_bytes > MAX_KEPT_BYTES:
            raise QuotaExceeded(
                "TAPS_TOO_LARGE",
                "inner steps keep a step's taps, which are more bytes than a device holds of one adapter",
                limit=MAX_KEPT_BYTES,
                actual=self._bytes + tensor_bytes,
                remedy="Use inner_steps 1, or fewer rows_per_step, shorter rows or fewer target modules.",
            )
        self._bytes += tensor_bytes

    def keep(self, site: int, x_NI: Tensor, grad_NO: Tensor) -> None:
        self._pairs.append((self._adapters[site], x_NI, grad_NO))

    def clear(self) -> None:
        self._pairs.clear()
        self._bytes = 0

    def gradients(self, weights: Weights, start: Weights) -> dict[TensorKey, Tensor]:
        """The surrogate's gradient at `weights`, by gradient key; `start` is w0. New tensors."""
        sums = {key.gradient: torch.zeros_like(weight) for key, weight in weights.items()}
        with torch.no_grad():
            for adapter, x_NI, grad_NO in self._pairs:
                moved_NO = adapter.forward(x_NI, weights) - adapter.forward(x_NI, start)
                for key, gradient in adapter.gradient(x_NI, moved_NO + grad_NO, weights).items():
                    sums[key.gradient].add_(gradient)
        return sums
