"""RMSNorm, rotary embedding and SwiGLU of a frozen model, forward and backward, into given buffers.

Without weight gradients each is a few passes. Shapes: N rows x tokens, D hidden, F intermediate, B rows,
T tokens, H heads, E head size. Numbers agree with transformers' modules to rounding; float64 stays float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cola_runtime.base_model.workspace import Workspace

aten = torch.ops.aten


def rms_norm(h_ND: Tensor, weight_D: Tensor, eps: float, out_ND: Tensor, space: Workspace) -> Tensor:
    """out = w * h / sqrt(mean(h^2) + eps); returns the inverse root [N, 1], in at least float32."""
    if h_ND.is_cuda:
        inverse: Tensor = _cuda().rms_norm(h_ND, weight_D, eps, out_ND)
        return inverse
    wide_ND = widened(h_ND, "norm.wide", space)
    norm_N1 = torch.linalg.vector_norm(wide_ND, dim=1, keepdim=True)
    inverse_N1: Tensor = norm_N1.square_().div_(h_ND.shape[1]).add_(eps).rsqrt_()
    if wide_ND is h_ND:
        torch.mul(h_ND, inverse_N1, out=out_ND).mul_(weight_D)
    else:  # an operation in 16 bits takes longer than one in float32
        out_ND.copy_(wide_ND.mul_(inverse_N1).mul_(weight_D))
    return inverse_N1


def _cuda() -> Any:
    """Imported where there is such a device: only torch for CUDA brings what it needs."""
    from cola_runtime.base_model import cuda_ops

    return cuda_ops


class ResidualGradient:
    """The gradient of the residual stream, [N, D], on its way down through the norms.

    On a processor it is summed in at least float32, which is faster there than in 16 bits.
    """

    def __init__(self, like_ND: Tensor, space: Workspace) -> None:
        """Zero; `like_ND` in the model's dtype."""
        self._space = space
        dtype = like_ND.dtype if like_ND.is_cuda else _wide(like_ND)
        self._sum_ND = space.tensor("dh", tuple(like_ND.shape), dtype).zero_()
        self.rounded_ND = self._rounded(like_ND.dtype)  # in the model's dtype, valid until more is added

    def add_rms_norm_backward(
        self, grad_ND: Tensor, h_ND: Tensor, inverse_N1: Tensor, weight_D: Tensor
    ) -> None:
        """+= i (w g) - h i^3 mean(w g h), i the inverse root; may overwrite grad."""
        if h_ND.is_cuda:
            _cuda().add_rms_norm_backward(self._sum_ND, grad_ND, h_ND, inverse_N1, weight_D)
            return
        scaled_ND = widened(grad_ND, "norm.wide_grad", self._space).mul_(weight_D)
        wide_h_ND = widened(h_ND, "norm.wide", self._space)
        product_ND = self._space.tensor("norm.product", tuple(h_ND.shape), inverse_N1.dtype)
        torch.mul(scaled_ND, wide_h_ND, out=product_ND)
        slope_N1 = product_ND.sum(dim=1, keepdim=True).mul_(inverse_N1.pow(3)).div_(-h_ND.shape[1])
        self._sum_ND.addcmul_(scaled_ND, inverse_N1).addcmul_(wide_h_ND, slope_N1)
        self.rounded_ND = self._rounded(h_ND.dtype)

    def _rounded(self, dtype: torch.dtype) -> Tensor:
        if dtype == self._sum_ND.dtype:
            return self._sum_ND
        return self._space.tensor("dh.rounded", tuple(self._sum_ND.shape), dtype).copy_(self._sum_ND)


def widened(tensor: Tensor, name: str, space: Workspace) -> Tensor:
    """The tensor in at least float32: itself, or a copy in a buffer."""
    wide = _wide(tensor)
    return tensor if wide == tensor.dtype else space.tensor(name, tuple(tensor.shape), wide).copy_(tensor)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def rotate(x_BTHE: Tensor, cos_TE: Tensor, sin_TE: Tensor, out_BHTE: Tensor) -> None:
    """out = x cos + rotate_half(x) sin, with heads before tokens."""
    if x_BTHE.is_cuda:
        _cuda().rotate(x_BTHE, cos_TE, sin_TE, out_BHTE.transpose(1, 2), back=False)
        return
    x_BHTE = x_BTHE.transpose(1, 2)
    half = x_BHTE.shape[-1] // 2
    torch.mul(x_BHTE, cos_TE, out=out_BHTE)
    out_BHTE[..., :half].addcmul_(x_BHTE[..., half:], sin_TE[:, :half], value=-1)
    out_BHTE[..., half:].addcmul_(x_BHTE[..., :half], sin_TE[:, half:])


def rotate_backward(grad_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor, out_BTHE: Tensor) -> None:
    """The transpose of `rotate`, with tokens before heads."""
    if grad_BHTE.is_cuda:
        _cuda().rotate(grad_BHTE.transpose(1, 2), cos_TE, sin_TE, out_BTHE, back=True)
        return
    out_BHTE = out_BTHE.transpose(1, 2)
    half = grad_BHTE.shape[-1] // 2
    torch.mul(grad_BHTE, cos_TE, out=out_BHTE)
    out_BHTE[..., :half].addcmul_(grad_BHTE[..., half:], sin_TE[:, half:])
    out_BHTE[..., half:].addcmul_(grad_BHTE[..., :half], sin_TE[:, :half], value=-1)


def silu(gate_NF: Tensor, out_NF: Tensor) -> None:
    """out = gate * sigmoid(gate)."""
    aten.silu.out(gate_NF, out=out_NF)


def swiglu_backward(
    grad_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, silu_NF: Tensor, grad_gate_NF: Tensor, grad_up_NF: Tensor
) -> None:
    """Gradients of gate and up from that of silu(gate) * up, which is overwritten."""
    if grad_NF.is_cuda:
        _cuda().swiglu_backward(grad_NF, gate_NF, up_NF, grad_gate_NF, grad_up_NF)
        return
    torch.mul(grad_NF, silu_NF, out=grad_up_NF)
    aten.silu_backward.grad_input(grad_NF.mul_(up_NF), gate_NF, grad_input=grad_gate_NF)


def causal_mask(tokens: int, like: Tensor, *, keys: int) -> Tensor:
    """[T, U], U >= T: 0 where query t may see key u <= t, else -inf."""
    return like.new_full((tokens, keys), -torch.inf).triu_(1)
