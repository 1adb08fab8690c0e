"""Where the taps of one cohort at one input group go, and in which encoding.

Shapes: S segments, M tokens of one segment, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cola_runtime.gradients.taps import Tap, TapSink, activation_tensors, product_tensors, used_rows
from cola_runtime.types import Encoding, Site, TensorKey, TensorKind

OwnGradients = Callable[[], Mapping[TensorKey, Tensor]]
"""The kind's own gradients, [S, ...] each, scaled, in the wire's dtype. Called only when needed."""


class GroupTaps:
    """Encodes and hands out what one stack's backward has at hand."""

    def __init__(
        self,
        encoding: Encoding,
        *,
        site: Site,
        segments: Sequence[int],
        scalings: Sequence[float],
        loss_scales: Sequence[float],
        dtype: torch.dtype,
        sink: TapSink,
    ) -> None:
        self.scalings = scalings  # s of each segment
        self.dtype = dtype  # of gradients on the wire
        self._encoding = encoding
        self._site = site  # any of those that share x
        self._loss_scales = loss_scales  # of each segment's loss, and so of everything that comes in here
        self._segments = segments  # positions in BaseStep.segments
        self._sink = sink

    def emit(self, x_SMI: Tensor, grads_SMO: Mapping[int, Tensor], own: OwnGradients) -> None:
        """`grads_SMO`: g by site index. `own`'s tensors are handed on as they are: give them away."""
        if self._encoding is Encoding.ADAPTER_GRADIENT:
            self._hand_out(own())
            return
        activations = self._encoding is Encoding.ACTIVATIONS
        rows = used_rows(list(grads_SMO.values())) if activations else []
        for s, segment in enumerate(self._segments):
            x_MI, grads = x_SMI[s], {site: grad[s] for site, grad in grads_SMO.items()}
            tensors = (
                activation_tensors(x_MI, grads, rows[s])
                if activations
                else product_tensors(x_MI, grads, self._site, self.dtype)
            )
            self._sink(Tap(segment, self._unscaled(tensors, s)))

    def scale(self, grad: Tensor) -> Tensor:
        """s times a gradient [S, ...], in the wire's dtype; a new tensor."""
        scalings = torch.tensor(self.scalings, dtype=self.dtype)
        return grad.to(self.dtype) * scalings.view(-1, *(1,) * (grad.ndim - 1))

    def _hand_out(self, gradients: Mapping[TensorKey, Tensor]) -> None:
        """One dict per segment out of the stacked gradients; views, no copies."""
        by_key = [gradient.unbind(0) for gradient in gradients.values()]
        for s, tensors in enumerate(zip(*by_key, strict=True)):
            tap = self._unscaled(dict(zip(gradients, tensors, strict=True)), s)
            self._sink(Tap(self._segments[s], tap))

    def _unscaled(self, tensors: dict[TensorKey, Tensor], s: int) -> dict[TensorKey, Tensor]:
        """Divided by the segment's loss scale, exactly: in the wire's dtype, which is wider than float16."""
        scale = self._loss_scales[s]
        if scale == 1.0:
            return tensors
        return {
            key: tensor if key.kind is TensorKind.INPUT else tensor.to(self.dtype) / scale
            for key, tensor in tensors.items()
        }
