"""What a base step hands out while its backward pass runs, in the two exact encodings.

Shapes: S segments, N rows, I in_features, O out_features, R rank, J adapted sites of one input group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cola_runtime.types import TensorKey, TensorKind


@dataclass(frozen=True, slots=True)
class Tap:
    """One input group's tensors for one segment, contiguous and never overwritten by the base model."""

    segment: int  # position in BaseStep.segments
    tensors: dict[TensorKey, Tensor]


TapSink = Callable[[Tap], None]
"""Called on the compute thread during the backward pass, deepest layer first; must not block."""


def activation_tensors(x_NI: Tensor, grads: Mapping[int, Tensor]) -> dict[TensorKey, Tensor]:
    """x under the first site, g [N, O] under each of `grads`' sites; only rows where any g is not zero.

    A row with g = 0 adds nothing to any gradient, so dropping it is exact. Zero is tested on g itself: a mask
    would keep rows that reach no loss. The tensors are copies.
    """
    used_N = _any_nonzero(list(grads.values()))
    rows = used_N.nonzero().squeeze(1)
    pick = torch.clone if len(rows) == len(used_N) else lambda tensor: tensor.index_select(0, rows)
    tensors = {TensorKey(next(iter(grads)), TensorKind.INPUT): pick(x_NI).contiguous()}
    for site, grad_NO in grads.items():
        tensors[TensorKey(site, TensorKind.OUTPUT_GRADIENT)] = pick(grad_NO).contiguous()
    return tensors


def _any_nonzero(grads: Sequence[Tensor]) -> Tensor:
    used_N = (grads[0] != 0).any(dim=1)
    for grad_NO in grads[1:]:
        used_N = used_N | (grad_NO != 0).any(dim=1)
    return used_N


def gradient_keys(sites: Sequence[int]) -> tuple[TensorKey, ...]:
    """Names of `split_gradients`' tensors: A of every site, then B of every site."""
    return tuple(
        TensorKey(site, kind) for kind in (TensorKind.GRAD_LORA_A, TensorKind.GRAD_LORA_B) for site in sites
    )


def split_gradients(
    grad_a_SJRI: Tensor, grads_b_SOR: Sequence[Tensor], keys: Sequence[TensorKey]
) -> list[dict[TensorKey, Tensor]]:
    """One dict per segment out of the stacked gradients of one input group; views, no copies."""
    sites = len(grads_b_SOR)
    parts_a = grad_a_SJRI.flatten(0, 1).unbind(0)
    parts_b = [grad_SOR.unbind(0) for grad_SOR in grads_b_SOR]
    return [
        dict(zip(keys, (*parts_a[s * sites : (s + 1) * sites], *(part[s] for part in parts_b)), strict=True))
        for s in range(len(parts_b[0]))
    ]
