"""Attention of a frozen model beside autograd's, from memory that holds anything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cola_runtime.base_model.attention import LONGEST_KEPT, CausalAttention
from cola_runtime.base_model.workspace import Workspace

ATTENTION = CausalAttention(heads=6, key_heads=2, head_size=8, scaling=8**-0.5)
ROWS = 3


class _DirtyWorkspace(Workspace):
    """What a fresh buffer holds is undefined: here it is what no product forgives."""

    def _allocated(self, _name: str, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.full((numel,), torch.nan, dtype=dtype)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 44, LONGEST_KEPT + 1])
def test_attention_of_any_length_is_autograds_whatever_its_buffers_held(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    width = (ATTENTION.heads + 2 * ATTENTION.key_heads) * ATTENTION.head_size
    qkv_BTW = torch.randn(ROWS, tokens, width, dtype=torch.float64, generator=generator)
    grad_BTHE = torch.randn(
        ROWS, tokens, ATTENTION.heads, ATTENTION.head_size, dtype=torch.float64, generator=generator
    )
    angles_TE = torch.randn(tokens, 4, dtype=torch.float64, generator=generator).repeat(1, 2)
    cos_TE, sin_TE = angles_TE.cos(), angles_TE.sin()

    space, rotary = _DirtyWorkspace(), ATTENTION.rotary(cos_TE, sin_TE)
    out_BTHE, dqkv_BTW = torch.empty_like(grad_BTHE), torch.empty_like(qkv_BTW)
    record = ATTENTION.forward(qkv_BTW, rotary, out_BTHE, "slot", space)
    ATTENTION.backward(grad_BTHE, record, rotary, dqkv_BTW, space)

    leaf_BTW = qkv_BTW.clone().requires_grad_()
    expected_BTHE = _attention(leaf_BTW, cos_TE, sin_TE)
    expected_BTHE.backward(grad_BTHE)
    assert leaf_BTW.grad is not None
    torch.testing.assert_close(out_BTHE, expected_BTHE.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dqkv_BTW, leaf_BTW.grad, rtol=1e-11, atol=1e-11)


def _attention(qkv_BTW: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    heads_BXTE = qkv_BTW.unflatten(-1, (-1, ATTENTION.head_size)).transpose(1, 2)
    q, k, v = heads_BXTE.split([ATTENTION.heads, ATTENTION.key_heads, ATTENTION.key_heads], dim=1)
    q, k = (x * cos_TE + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin_TE for x in (q, k))
    groups = ATTENTION.heads // ATTENTION.key_heads
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    attended = scaled_dot_product_attention(q, k, v, is_causal=True, scale=ATTENTION.scaling)
    return attended.transpose(1, 2)
