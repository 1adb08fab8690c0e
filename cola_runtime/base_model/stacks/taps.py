"""Where the taps of one cohort at one input group go, and in which encoding.

Shapes: S segments, M tokens of one segment, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from cola_runtime.base_model.tap_carrier import Delivery, Recipients, TapCarrier
from cola_runtime.encodings import Encoding
from cola_runtime.gradients.taps import (
    Tap,
    activation_tensors,
    any_used,
    product_tensors,
    used_rows,
)
from cola_runtime.types import Site, TensorKey, TensorKind

OwnGradients = Callable[[], Mapping[TensorKey, Tensor]]
"""The kind's own gradients, [S, ...] each, scaled, in the dtype they travel in. Called only when needed."""


class GroupTaps:
    """Encodes and hands out what one stack's backward has at hand."""

    def __init__(
        self,
        encoding: Encoding,
        *,
        site: Site,
        recipients: Recipients,
        scalings_S: Tensor,
        product_dtype: torch.dtype,
        carrier: TapCarrier,
    ) -> None:
        self.scalings_S = scalings_S  # s of each segment, in the dtype that own gradients travel in
        self._product_dtype = product_dtype
        self._encoding = encoding
        self._site = site  # any of those that share x
        self._recipients = recipients
        self._carrier = carrier

    @property
    def dtype(self) -> torch.dtype:
        """Of the kind's own gradients on the wire, and of whatever was under a loss scale."""
        return self.scalings_S.dtype

    def emit(self, x_SMI: Tensor, grads_SMO: Mapping[int, Tensor], own: OwnGradients) -> None:
        """`grads_SMO`: g by site index. `own`'s tensors are handed on as they are: give them away."""
        if self._encoding is Encoding.ADAPTER_GRADIENT:
            self._carry(own())
            return
        if self._carrier.crosses:
            self._emit_stacked(x_SMI, grads_SMO)
            return
        activations = self._encoding is Encoding.ACTIVATIONS
        rows = used_rows(list(grads_SMO.values())) if activations else []
        recipients = self._recipients
        for s, segment in enumerate(recipients.segments):
            x_MI, grads = x_SMI[s], {site: grad[s] for site, grad in grads_SMO.items()}
            tensors = (
                activation_tensors(x_MI, grads, rows[s])
                if activations
                else product_tensors(x_MI, grads, self._site, self._product_dtype)
            )
            recipients.sink(Tap(segment, self._unscaled(tensors, recipients.loss_scales[s])))

    def scale(self, grad: Tensor) -> Tensor:
        """s times a gradient [S, ...], in the dtype it travels in; a new tensor."""
        return grad.to(self.dtype) * self.scalings_S.view(-1, *(1,) * (grad.ndim - 1))

    def _emit_stacked(self, x_SMI: Tensor, grads_SMO: Mapping[int, Tensor]) -> None:
        """All segments at once, in as few operations as there are sites.

        Which rows are used is found out where the copies arrive: here it would stop the accelerator.
        """
        if self._encoding is Encoding.WEIGHT_GRADIENT:
            self._carry(product_tensors(x_SMI, grads_SMO, self._site, self._product_dtype))
            return
        sites = list(grads_SMO)
        tensors = [any_used(list(grads_SMO.values())), *map(_copied, (x_SMI, *grads_SMO.values()))]
        self._carrier.carry(tensors, Delivery(self._recipients, partial(self._hand_out_used, sites)))

    def _hand_out_used(self, sites: Sequence[int], to: Recipients, copies: Sequence[Tensor]) -> None:
        used_SM, x_SMI, *grads_SMO = copies
        for s, segment in enumerate(to.segments):
            grads = {site: grad[s] for site, grad in zip(sites, grads_SMO, strict=True)}
            rows_K = None if used_SM[s].all() else used_SM[s].nonzero().squeeze(1)
            tensors = activation_tensors(x_SMI[s], grads, rows_K)
            to.sink(Tap(segment, self._unscaled(tensors, to.loss_scales[s])))

    def _carry(self, gradients: Mapping[TensorKey, Tensor]) -> None:
        delivery = Delivery(self._recipients, partial(self._hand_out, list(gradients)))
        self._carrier.carry(list(gradients.values()), delivery)

    def _hand_out(self, keys: Sequence[TensorKey], to: Recipients, gradients: Sequence[Tensor]) -> None:
        """One dict per segment out of the stacked gradients; views, no copies."""
        by_key = [gradient.unbind(0) for gradient in gradients]
        stacked = zip(*by_key, strict=True)
        for segment, scale, tensors in zip(to.segments, to.loss_scales, stacked, strict=False):  # not ghosts
            to.sink(Tap(segment, self._unscaled(dict(zip(keys, tensors, strict=True)), scale)))

    def _unscaled(self, tensors: dict[TensorKey, Tensor], scale: float) -> dict[TensorKey, Tensor]:
        """Divided by the segment's loss scale, exactly: in the adapter's dtype, wider than float16."""
        if scale == 1.0:
            return tensors
        return {
            key: tensor if key.kind is TensorKind.INPUT else tensor.to(self.dtype) / scale
            for key, tensor in tensors.items()
        }


def _copied(tensor: Tensor) -> Tensor:
    """Apart from the body's buffers, which the next layer fills."""
    return tensor.clone(memory_format=torch.contiguous_format)
