"""Where the taps of one cohort at one input group go, and in which encoding.

Shapes: S segments, M tokens of one segment, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cola_runtime.base_model.accelerator import constants
from cola_runtime.base_model.tap_carrier import TapOutlet
from cola_runtime.gradients.taps import (
    Tap,
    activation_tensors,
    any_used,
    product_tensors,
    used_rows,
)
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
        outlet: TapOutlet,
    ) -> None:
        self.scalings = scalings  # s of each segment
        self.dtype = dtype  # of gradients on the wire
        self._encoding = encoding
        self._site = site  # any of those that share x
        self._loss_scales = loss_scales  # of each segment's loss, and so of everything that comes in here
        self._segments = segments  # positions in BaseStep.segments
        self._outlet = outlet

    def emit(self, x_SMI: Tensor, grads_SMO: Mapping[int, Tensor], own: OwnGradients) -> None:
        """`grads_SMO`: g by site index. `own`'s tensors are handed on as they are: give them away."""
        if self._encoding is Encoding.ADAPTER_GRADIENT:
            self._carry(own())
            return
        if self._outlet.carrier.crosses:
            self._emit_stacked(x_SMI, grads_SMO)
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
            self._outlet.sink(Tap(segment, self._unscaled(tensors, s)))

    def scale(self, grad: Tensor) -> Tensor:
        """s times a gradient [S, ...], in the wire's dtype; a new tensor."""
        scalings = constants(self.scalings, self.dtype, grad.device)
        return grad.to(self.dtype) * scalings.view(-1, *(1,) * (grad.ndim - 1))

    def _emit_stacked(self, x_SMI: Tensor, grads_SMO: Mapping[int, Tensor]) -> None:
        """All segments at once, in as few operations as there are sites.

        Which rows are used is found out where the copies arrive: here it would stop the accelerator.
        """
        if self._encoding is Encoding.WEIGHT_GRADIENT:
            self._carry(product_tensors(x_SMI, grads_SMO, self._site, self.dtype))
            return
        sites = list(grads_SMO)
        tensors = [any_used(list(grads_SMO.values())), *map(_copied, (x_SMI, *grads_SMO.values()))]
        self._outlet.carrier.carry(tensors, lambda copies: self._hand_out_used(sites, copies))

    def _hand_out_used(self, sites: Sequence[int], copies: Sequence[Tensor]) -> None:
        used_SM, x_SMI, *grads_SMO = copies
        for s, segment in enumerate(self._segments):
            grads = {site: grad[s] for site, grad in zip(sites, grads_SMO, strict=True)}
            rows_K = None if used_SM[s].all() else used_SM[s].nonzero().squeeze(1)
            tensors = activation_tensors(x_SMI[s], grads, rows_K)
            self._outlet.sink(Tap(segment, self._unscaled(tensors, s)))

    def _carry(self, gradients: Mapping[TensorKey, Tensor]) -> None:
        keys = list(gradients)
        self._outlet.carrier.carry(
            list(gradients.values()),
            lambda copies: self._hand_out(dict(zip(keys, copies, strict=True))),
        )

    def _hand_out(self, gradients: Mapping[TensorKey, Tensor]) -> None:
        """One dict per segment out of the stacked gradients; views, no copies."""
        by_key = [gradient.unbind(0) for gradient in gradients.values()]
        for s, tensors in enumerate(zip(*by_key, strict=True)):
            tap = self._unscaled(dict(zip(gradients, tensors, strict=True)), s)
            self._outlet.sink(Tap(self._segments[s], tap))

    def _unscaled(self, tensors: dict[TensorKey, Tensor], s: int) -> dict[TensorKey, Tensor]:
        """Divided by the segment's loss scale, exactly: in the wire's dtype, which is wider than float16."""
        scale = self._loss_scales[s]
        if scale == 1.0:
            return tensors
        return {
            key: tensor if key.kind is TensorKind.INPUT else tensor.to(self.dtype) / scale
            for key, tensor in tensors.items()
        }


def _copied(tensor: Tensor) -> Tensor:
    """Apart from the body's buffers, which the next layer fills."""
    return tensor.clone(memory_format=torch.contiguous_format)
