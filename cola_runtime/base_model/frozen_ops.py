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
    wide_ND = _widened(h_ND, "norm.wide", space)
    norm_N1 = torch.linalg.vector_norm(wide_ND, dim=1, keepdim=True)
    inverse_N1: Tensor = norm_N1.square_().div_(h_ND.shape[1]).add_(eps).rsqrt_()
    _scale_rows(h_ND, wide_ND, inverse_N1, out_ND)
    out_ND.mul_(weight_D)
    return inverse_N1


def _cuda() -> Any:
    """Imported where there is such a device: only torch for CUDA brings what it needs."""
    from cola_runtime.base_model import cuda_ops

    return cuda_ops


def _scale_rows(h_ND: Tensor, wide_ND: Tensor, inverse_N1: Tensor, out_ND: Tensor) -> None:
    if wide_ND is h_ND:
        torch.mul(h_ND, inverse_N1, out=out_ND)
    else:
        out_ND.copy_(wide_ND.mul_(inverse_N1))


def add_rms_norm_backward(
    dh_ND: Tensor, grad_ND: Tensor, h_ND: Tensor, inverse_N1: Tensor, weight_D: Tensor, space: Workspace
) -> None:
    """In place: dh += i (w g) - h i^3 mean(w g h), i the inverse root; overwrites grad."""
    if h_ND.is_cuda:
        _cuda().add_rms_norm_backward(dh_ND, grad_ND, h_ND, inverse_N1, weight_D)
        return
    grad_ND.mul_(weight_D)
    product_ND = space.tensor("norm.product", tuple(h_ND.shape), inverse_N1.dtype)
    wide_grad_ND = _widened(grad_ND, "norm.wide_grad", space)
    wide_h_ND = _widened(h_ND, "norm.wide", space)
    torch.mul(wide_grad_ND, wide_h_ND, out=product_ND)
    slope_N1 = product_ND.sum(dim=1, keepdim=True).mul_(inverse_N1.pow(3)).div_(-h_ND.shape[1])
    if wide_h_ND is h_ND:
        dh_ND.addcmul_(grad_ND, inverse_N1).addcmul_(h_ND, slope_N1)
    else:
        wide_h_ND.mul_(slope_N1).addcmul_(wide_grad_ND, inverse_N1)
        dh_ND.add_(grad_ND.copy_(wide_h_ND))


def _widened(tensor: Tensor, name: str, space: Workspace) -> Tensor:
    """The tensor in at least float32: itself, or a copy in a buffer."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor if wide == tensor.dtype else space.tensor(name, tuple(tensor.shape), wide).copy_(tensor)


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


def causal_mask(tokens: int, like: Tensor) -> Tensor:
    """[T, T]: 0 where query t may see key u <= t, else -inf."""
    return like.new_full((tokens, tokens), -torch.inf).triu_(1)
