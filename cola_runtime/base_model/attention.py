"""Causal grouped-query attention of a frozen model, forward and backward, into reused buffers.

On a processor short rows keep their probabilities, and long ones go through a fused kernel, whose memory is
linear; on an accelerator all rows do, where there is one for the dtype.
Shapes: B rows, T tokens, H query heads, K key heads, G = H / K, E head size, W = (H + 2 K) E, and
Z = B K batched products of G T queries with T keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cola_runtime.base_model.attention_kernels import AttentionKernel, Saved, attention_kernel
from cola_runtime.base_model.frozen_ops import causal_mask, rotate, rotate_backward
from cola_runtime.base_model.workspace import Workspace

LONGEST_KEPT = 512  # tokens, on a processor; above, probabilities would outgrow all other activations
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary factors of one batch, in the model's dtype, and the causal mask of its length."""

    cos_TE: Tensor
    sin_TE: Tensor
    mask_GTT: Tensor  # empty where a kernel is used
    kernel: AttentionKernel | None


@dataclass(frozen=True, slots=True)
class AttentionRecord:
    """What the backward pass needs of one layer's attention."""

    q_ZQE: Tensor
    k_ZTE: Tensor
    v_ZTE: Tensor
    probabilities_ZQT: Tensor | None  # None where a fused kernel computed it, of q, k and v [B, *, T, E]
    fused: tuple[AttentionKernel, Saved] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalAttention:
    """The shape of a model's attention; all layers share it."""

    heads: int
    key_heads: int
    head_size: int
    scaling: float

    @property
    def groups(self) -> int:
        return self.heads // self.key_heads

    def rotary(self, cos_TE: Tensor, sin_TE: Tensor) -> Rotary:
        kernel = attention_kernel(cos_TE, head_size=self.head_size)
        if not cos_TE.is_cuda and len(cos_TE) <= LONGEST_KEPT:
            kernel = None
        mask_TT = causal_mask(len(cos_TE) if kernel is None else 0, cos_TE)
        return Rotary(cos_TE, sin_TE, mask_TT.repeat(self.groups, 1), kernel)

    def forward(
        self, qkv_BTW: Tensor, rotary: Rotary, out_BTHE: Tensor, slot: str, space: Workspace
    ) -> AttentionRecord:
        """softmax(scaling q k^T + mask) v of rotated q and k; `slot` names the buffers that must survive."""
        rows, tokens, _ = qkv_BTW.shape
        kept = {
            name: space.tensor(f"{slot}.{name}", (rows, heads, tokens, self.head_size), qkv_BTW.dtype)
            for name, heads in (("q", self.heads), ("k", self.key_heads), ("v", self.key_heads))
        }
        q_BTHE, k_BTKE, v_BTKE = self._heads(qkv_BTW)
        rotate(q_BTHE, rotary.cos_TE, rotary.sin_TE, kept["q"])
        rotate(k_BTKE, rotary.cos_TE, rotary.sin_TE, kept["k"])
        kept["v"].copy_(v_BTKE.transpose(1, 2))
        if rotary.kernel is not None:
            return self._attend_fused(rotary.kernel, kept, out_BTHE)
        return self._attend(kept["q"], kept["k"], kept["v"], rotary, out_BTHE, slot, space)

    def backward(
        self,
        grad_BTHE: Tensor,
        record: AttentionRecord,
        rotary: Rotary,
        out_BTW: Tensor,
        space: Workspace,
    ) -> None:
        """out = d loss / d qkv."""
        shape = grad_BTHE.shape
        grad_BHTE = space.tensor("attention.grad", (shape[0], shape[2], shape[1], shape[3]), grad_BTHE.dtype)
        grad_BHTE.copy_(grad_BTHE.transpose(1, 2))
        if record.fused is not None:
            kernel, saved = record.fused
            q, k, v = record.q_ZQE, record.k_ZTE, record.v_ZTE
            dq, dk, dv = kernel.backward(grad_BHTE, q, k, v, saved, self.scaling)
        else:
            assert record.probabilities_ZQT is not None
            dq, dk, dv = self._gradients(grad_BHTE, record, record.probabilities_ZQT, space)
        q_BTHE, k_BTKE, v_BTKE = self._heads(out_BTW)
        rotate_backward(dq.view(grad_BHTE.shape), rotary.cos_TE, rotary.sin_TE, q_BTHE)
        key_shape = (shape[0], self.key_heads, shape[1], shape[3])
        rotate_backward(dk.view(key_shape), rotary.cos_TE, rotary.sin_TE, k_BTKE)
        v_BTKE.copy_(dv.view(key_shape).transpose(1, 2))

    def _heads(self, qkv_BTW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads_BTXE = qkv_BTW.view(*qkv_BTW.shape[:2], -1, self.head_size)
        q_BTHE, k_BTKE, v_BTKE = torch.split(heads_BTXE, [self.heads, self.key_heads, self.key_heads], dim=2)
        return q_BTHE, k_BTKE, v_BTKE

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, out_BTHE: Tensor, slot: str, space: Workspace
    ) -> AttentionRecord:
        tokens = k.shape[2]
        products = len(q) * self.key_heads
        q_ZQE = q.view(products, -1, self.head_size)
        k_ZTE, v_ZTE = k.flatten(0, 1), v.flatten(0, 1)
        scores_ZQT = space.tensor(f"{slot}.p", (products, q_ZQE.shape[1], tokens), q.dtype)
        torch.baddbmm(rotary.mask_GTT, q_ZQE, k_ZTE.transpose(1, 2), alpha=self.scaling, out=scores_ZQT)
        torch.softmax(scores_ZQT, dim=2, out=scores_ZQT)
        mixed_ZQE = space.tensor("attention.mixed", tuple(q_ZQE.shape), q.dtype)
        torch.bmm(scores_ZQT, v_ZTE, out=mixed_ZQE)
        out_BTHE.copy_(mixed_ZQE.view(q.shape).transpose(1, 2))
        return AttentionRecord(q_ZQE, k_ZTE, v_ZTE, scores_ZQT, None)

    def _gradients(
        self, grad_BHTE: Tensor, record: AttentionRecord, p_ZQT: Tensor, space: Workspace
    ) -> tuple[Tensor, Tensor, Tensor]:
        def buffer(name: str, like: Tensor) -> Tensor:
            return space.tensor(f"attention.{name}", tuple(like.shape), like.dtype)

        grad_ZQE = grad_BHTE.view(record.q_ZQE.shape)
        dv_ZTE = torch.bmm(p_ZQT.transpose(1, 2), grad_ZQE, out=buffer("dv", record.v_ZTE))
        dp_ZQT = torch.bmm(grad_ZQE, record.v_ZTE.transpose(1, 2), out=buffer("dp", p_ZQT))
        ds_ZQT = buffer("ds", p_ZQT)
        aten._softmax_backward_data.out(dp_ZQT, p_ZQT, 2, p_ZQT.dtype, grad_input=ds_ZQT)
        dq_ZQE = torch.bmm(ds_ZQT, record.k_ZTE, out=buffer("dq", record.q_ZQE)).mul_(self.scaling)
        dk_ZTE = torch.bmm(ds_ZQT.transpose(1, 2), record.q_ZQE, out=buffer("dk", record.k_ZTE))
        return dq_ZQE, dk_ZTE.mul_(self.scaling), dv_ZTE

    def _attend_fused(
        self, kernel: AttentionKernel, kept: dict[str, Tensor], out_BTHE: Tensor
    ) -> AttentionRecord:
        q, k, v = kept["q"], kept["k"], kept["v"]
        saved = kernel.forward(q, k, v, self.scaling)
        out_BTHE.copy_(saved[0].transpose(1, 2))
        return AttentionRecord(q, k, v, None, (kernel, saved))
