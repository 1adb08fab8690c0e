"""What a base step hands out while its backward pass runs, in the two exact encodings.

Shapes: S segments, N rows, I in_features, O out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
    rows = _any_nonzero(list(grads.values())).nonzero().squeeze(1)
    tensors = {TensorKey(next(iter(grads)), TensorKind.INPUT): x_NI.index_select(0, rows)}
    for site, grad_NO in grads.items():
        tensors[TensorKey(site, TensorKind.OUTPUT_GRADIENT)] = grad_NO.index_select(0, rows)
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
    grads_a_SRI: Sequence[Tensor], grads_b_SOR: Sequence[Tensor], keys: Sequence[TensorKey]
) -> list[dict[TensorKey, Tensor]]:
    """One dict per segment out of the stacked gradients of one input group's sites; views, no copies."""
    by_site = [grad.unbind(0) for grad in (*grads_a_SRI, *grads_b_SOR)]
    return [dict(zip(keys, of_segment, strict=True)) for of_segment in zip(*by_site, strict=True)]
