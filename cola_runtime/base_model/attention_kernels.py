"""Fused attention, forward and backward, by torch's own operators: which there is for a dtype on a device.

All are exact up to rounding, causal and linear in memory.
Shapes: B rows, T tokens, H query heads, K key heads, E head size; q [B, H, T, E], k and v [B, K, T, E].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

aten = torch.ops.aten

Saved = tuple[Any, ...]
"""What a kernel's forward leaves for its backward; the first is its output [B, H, T, E]."""


class AttentionKernel(Protocol):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Saved:
        """softmax(scaling q k^T + causal mask) v, and what it took."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Saved, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""


def attention_kernel(like: Tensor, *, head_size: int) -> AttentionKernel | None:
    """The one for rows like this tensor, however long; None: there is none, so softmax is done by hand."""
    if not like.is_cuda:
        return HostFlash()
    if head_size % 8 or head_size > 256:
        return None
    if like.dtype in (torch.bfloat16, torch.float16):
        return CudaFlash()
    return CudaEfficient() if like.dtype == torch.float32 else None


@dataclass(frozen=True, slots=True)
class HostFlash:
    """On processors, in any dtype. Keys are repeated for their query heads."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Saved:
        groups = q.shape[1] // k.shape[1]
        saved: Saved = aten._scaled_dot_product_flash_attention_for_cpu(
            q, _repeated(k, groups), _repeated(v, groups), 0.0, True, scale=scaling
        )
        return saved

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Saved, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups = q.shape[1] // k.shape[1]
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, _repeated(k, groups), _repeated(v, groups), *saved, 0.0, True, scale=scaling
        )
        return dq, _summed(dk, groups), _summed(dv, groups)


@dataclass(frozen=True, slots=True)
class CudaFlash:
    """FlashAttention-2, in bfloat16 and float16. Takes fewer key heads than query heads as they are."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Saved:
        saved: Saved = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scaling)
        return saved

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Saved, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, normaliser, starts_q, starts_k, longest_q, longest_k, seed, offset, _ = saved
        gradients: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, output, normaliser, starts_q, starts_k, longest_q, longest_k,
            0.0, True, seed, offset, scale=scaling,
        )  # fmt: skip
        return gradients


@dataclass(frozen=True, slots=True)
class CudaEfficient:
    """Memory-efficient attention, also in float32. Keys are repeated for their query heads."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Saved:
        groups = q.shape[1] // k.shape[1]
        saved: Saved = aten._scaled_dot_product_efficient_attention(
            q, _repeated(k, groups), _repeated(v, groups), None, True, 0.0, True, scale=scaling
        )
        return saved

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Saved, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups = q.shape[1] // k.shape[1]
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, _repeated(k, groups), _repeated(v, groups), None, *saved,
            0.0, [True, True, True, False], True, scale=scaling,
        )  # fmt: skip
        return dq, _summed(dk, groups), _summed(dv, groups)


def _repeated(keys_BKTE: Tensor, groups: int) -> Tensor:
    return keys_BKTE.repeat_interleave(groups, dim=1)


def _summed(grads_BHTE: Tensor, groups: int) -> Tensor:
    rows, heads, tokens, size = grads_BHTE.shape
    return grads_BHTE.reshape(rows, heads // groups, groups, tokens, size).sum(dim=2)
