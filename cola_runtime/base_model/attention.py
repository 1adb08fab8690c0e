"""Causal grouped-query attention of a frozen model, forward and backward, into reused buffers.

On a processor short rows keep their probabilities, and long ones go through a fused kernel, whose memory is
linear; on an accelerator all rows do, where there is one for the dtype.
Shapes: B rows, T tokens, H query heads, K key heads, G = H / K, E head size, W = (H + 2 K) E, and
Z = B K batched products of G T = Q queries with U keys: T, or where probabilities are kept the next
multiple of KEYS, the ones behind the row's being zero and masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cola_runtime.base_model.attention_kernels import AttentionKernel, Saved, attention_kernel
from cola_runtime.base_model.frozen_ops import causal_mask, rotate, rotate_backward, widened
from cola_runtime.base_model.workspace import Workspace

LONGEST_KEPT = 512  # tokens, on a processor; above, probabilities would outgrow all other activations
KEYS = 16  # float32 numbers of the widest vector: a processor takes what is left of them one by one
WIDE_KEYS = 256  # up to so many, softmax in float32 is faster on a processor than in 16 bits
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary factors of one batch, in the model's dtype, and the causal mask of its length."""

    cos_TE: Tensor
    sin_TE: Tensor
    mask_QU: Tensor  # empty where a kernel is used
    kernel: AttentionKernel | None


@dataclass(frozen=True, slots=True)
class AttentionRecord:
    """What the backward pass needs of one layer's attention."""

    q_ZQE: Tensor
    k_ZUE: Tensor
    v_ZUE: Tensor
    probabilities_ZQU: Tensor | None  # None where a fused kernel computed it, of q, k and v [B, *, T, E]
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
        tokens = len(cos_TE) if kernel is None else 0
        mask_QU = causal_mask(tokens, cos_TE, keys=_whole(tokens)).repeat(self.groups, 1)
        return Rotary(cos_TE, sin_TE, mask_QU, kernel)

    def forward(
        self, qkv_BTW: Tensor, rotary: Rotary, out_BTHE: Tensor, slot: str, space: Workspace
    ) -> AttentionRecord:
        """softmax(scaling q k^T + mask) v of rotated q and k; `slot` names the buffers that must survive."""
        rows, tokens, _ = qkv_BTW.shape
        keys = tokens if rotary.kernel is not None else _whole(tokens)
        q_BHTE, k_BKUE, v_BKUE = (
            space.tensor(f"{slot}.{name}", (rows, heads, length, self.head_size), qkv_BTW.dtype)
            for name, heads, length in (
                ("q", self.heads, tokens),
                ("k", self.key_heads, keys),
                ("v", self.key_heads, keys),
            )
        )
        q_BTHE, k_BTKE, v_BTKE = self._heads(qkv_BTW)
        rotate(q_BTHE, rotary.cos_TE, rotary.sin_TE, q_BHTE)
        rotate(k_BTKE, rotary.cos_TE, rotary.sin_TE, k_BKUE[:, :, :tokens])
        v_BKUE[:, :, :tokens].copy_(v_BTKE.transpose(1, 2))
        if rotary.kernel is not None:
            return self._attend_fused(rotary.kernel, q_BHTE, k_BKUE, v_BKUE, out_BTHE)
        for behind in (k_BKUE[:, :, tokens:], v_BKUE[:, :, tokens:]):
            behind.zero_()
        return self._attend(q_BHTE, k_BKUE, v_BKUE, rotary, out_BTHE, slot, space)

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
            q, k, v = record.q_ZQE, record.k_ZUE, record.v_ZUE
            dq, dk, dv = kernel.backward(grad_BHTE, q, k, v, saved, self.scaling)
        else:
            assert record.probabilities_ZQU is not None
            dq, dk, dv = self._gradients(grad_BHTE, record, record.probabilities_ZQU, space)
        q_BTHE, k_BTKE, v_BTKE = self._heads(out_BTW)
        rotate_backward(dq.view(grad_BHTE.shape), rotary.cos_TE, rotary.sin_TE, q_BTHE)
        dk_BKTE, dv_BKTE = (
            grad.view(shape[0], self.key_heads, -1, shape[3])[:, :, : shape[1]] for grad in (dk, dv)
        )
        rotate_backward(dk_BKTE, rotary.cos_TE, rotary.sin_TE, k_BTKE)
        v_BTKE.copy_(dv_BKTE.transpose(1, 2))

    def _heads(self, qkv_BTW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads_BTXE = qkv_BTW.view(*qkv_BTW.shape[:2], -1, self.head_size)
        q_BTHE, k_BTKE, v_BTKE = torch.split(heads_BTXE, [self.heads, self.key_heads, self.key_heads], dim=2)
        return q_BTHE, k_BTKE, v_BTKE

    def _attend(
        self,
        q_BHTE: Tensor,
        k_BKUE: Tensor,
        v_BKUE: Tensor,
        rotary: Rotary,
        out_BTHE: Tensor,
        slot: str,
        space: Workspace,
    ) -> AttentionRecord:
        products, keys = len(q_BHTE) * self.key_heads, k_BKUE.shape[2]
        q_ZQE = q_BHTE.view(products, -1, self.head_size)
        k_ZUE, v_ZUE = k_BKUE.flatten(0, 1), v_BKUE.flatten(0, 1)
        scores_ZQU = space.tensor(f"{slot}.p", (products, q_ZQE.shape[1], keys), q_BHTE.dtype)
        torch.baddbmm(rotary.mask_QU, q_ZQE, k_ZUE.transpose(1, 2), alpha=self.scaling, out=scores_ZQU)
        wide_ZQU = widened(scores_ZQU, "attention.wide", space) if keys <= WIDE_KEYS else scores_ZQU
        torch.softmax(wide_ZQU, dim=2, out=wide_ZQU)
        if wide_ZQU is not scores_ZQU:
            scores_ZQU.copy_(wide_ZQU)
        mixed_ZQE = space.tensor("attention.mixed", tuple(q_ZQE.shape), q_BHTE.dtype)
        torch.bmm(scores_ZQU, v_ZUE, out=mixed_ZQE)
        out_BTHE.copy_(mixed_ZQE.view(q_BHTE.shape).transpose(1, 2))
        return AttentionRecord(q_ZQE, k_ZUE, v_ZUE, scores_ZQU, None)

    def _gradients(
        self, grad_BHTE: Tensor, record: AttentionRecord, p_ZQU: Tensor, space: Workspace
    ) -> tuple[Tensor, Tensor, Tensor]:
        def buffer(name: str, like: Tensor) -> Tensor:
            return space.tensor(f"attention.{name}", tuple(like.shape), like.dtype)

        grad_ZQE = grad_BHTE.view(record.q_ZQE.shape)
        dv_ZUE = torch.bmm(p_ZQU.transpose(1, 2), grad_ZQE, out=buffer("dv", record.v_ZUE))
        dp_ZQU = torch.bmm(grad_ZQE, record.v_ZUE.transpose(1, 2), out=buffer("dp", p_ZQU))
        ds_ZQU = buffer("ds", p_ZQU)
        aten._softmax_backward_data.out(dp_ZQU, p_ZQU, 2, p_ZQU.dtype, grad_input=ds_ZQU)
        dq_ZQE = torch.bmm(ds_ZQU, record.k_ZUE, out=buffer("dq", record.q_ZQE)).mul_(self.scaling)
        dk_ZUE = torch.bmm(ds_ZQU.transpose(1, 2), record.q_ZQE, out=buffer("dk", record.k_ZUE))
        return dq_ZQE, dk_ZUE.mul_(self.scaling), dv_ZUE

    def _attend_fused(
        self, kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, out_BTHE: Tensor
    ) -> AttentionRecord:
        saved = kernel.forward(q, k, v, self.scaling)
        out_BTHE.copy_(saved[0].transpose(1, 2))
        return AttentionRecord(q, k, v, None, (kernel, saved))


def _whole(tokens: int) -> int:
    return -(-tokens // KEYS) * KEYS
