"""Causal grouped-query attention of a frozen model, forward and backward, into reused buffers.

Short rows keep their probabilities; long ones go through torch's flash attention, whose memory is linear.
Shapes: B rows, T tokens, H query heads, K key heads, G = H / K, E head size, W = (H + 2 K) E, and
Z = B K batched products of G T queries with T keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cola_runtime.base_model.frozen_ops import causal_mask, rotate, rotate_backward
from cola_runtime.base_model.workspace import Workspace

LONGEST_KEPT = 512  # tokens; above, a row's probabilities would outgrow all its other activations
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary factors of one batch, in the model's dtype, and the causal mask of its length."""

    cos_TE: Tensor
    sin_TE: Tensor
    mask_GTT: Tensor


@dataclass(frozen=True, slots=True)
class AttentionRecord:
    """What the backward pass needs of one layer's attention."""

    q_ZQE: Tensor
    k_ZTE: Tensor
    v_ZTE: Tensor
    probabilities_ZQT: Tensor | None  # None where the row was long
    output_and_normaliser: tuple[Tensor, Tensor] | None  # of flash attention


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
        tokens = len(cos_TE) if len(cos_TE) <= LONGEST_KEPT else 0
        return Rotary(cos_TE, sin_TE, causal_mask(tokens, cos_TE.dtype).repeat(self.groups, 1))

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
        attend = self._attend if tokens <= LONGEST_KEPT else self._attend_long
        return attend(kept["q"], kept["k"], kept["v"], rotary, out_BTHE, slot, space)

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
        if record.probabilities_ZQT is None:
            dq, dk, dv = self._long_gradients(grad_BHTE, record)
        else:
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

    def _attend_long(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        _rotary: Rotary,
        out_BTHE: Tensor,
        _slot: str,
        _space: Workspace,
    ) -> AttentionRecord:
        output, normaliser = aten._scaled_dot_product_flash_attention_for_cpu(
            q, self._repeated(k), self._repeated(v), 0.0, True, scale=self.scaling
        )
        out_BTHE.copy_(output.transpose(1, 2))
        return AttentionRecord(q, k, v, None, (output, normaliser))

    def _long_gradients(self, grad_BHTE: Tensor, record: AttentionRecord) -> tuple[Tensor, Tensor, Tensor]:
        assert record.output_and_normaliser is not None
        output, normaliser = record.output_and_normaliser
        k, v = record.k_ZTE, record.v_ZTE
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_BHTE, record.q_ZQE, self._repeated(k), self._repeated(v), output, normaliser, 0.0, True,
            scale=self.scaling,
        )  # fmt: skip
        return dq, self._summed(dk), self._summed(dv)

    def _repeated(self, keys_BKTE: Tensor) -> Tensor:
        return keys_BKTE.repeat_interleave(self.groups, dim=1)

    def _summed(self, grads_BHTE: Tensor) -> Tensor:
        rows, _, tokens, size = grads_BHTE.shape
        return grads_BHTE.reshape(rows, self.key_heads, self.groups, tokens, size).sum(dim=2)
