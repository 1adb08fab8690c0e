"""The elementwise parts of a frozen Llama as single kernels for CUDA devices: each number is read once.

What `frozen_ops` and `loss` compute in several operations, with sums in float32 (float64 of float64) and
every result rounded once. Importing this needs triton, which torch for CUDA brings along.
Shapes: N rows x tokens, D hidden, F intermediate, B rows, T tokens, H heads, E head size, C labels, V
vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_VOCABULARY_BLOCK = 4096
_ELEMENTS_BLOCK = 1024


def rms_norm(h_ND: Tensor, weight_D: Tensor, eps: float, out_ND: Tensor) -> Tensor:
    """out = w * h / sqrt(mean(h^2) + eps); returns the inverse root [N, 1], in at least float32."""
    rows, columns = h_ND.shape
    inverse_N1 = h_ND.new_empty(rows, 1, dtype=_wide(h_ND))
    block = triton.next_power_of_2(columns)
    _rms_norm[(rows,)](h_ND, weight_D, out_ND, inverse_N1, columns, eps, BLOCK=block, num_warps=4)
    return inverse_N1


def add_rms_norm_backward(
    dh_ND: Tensor, grad_ND: Tensor, h_ND: Tensor, inverse_N1: Tensor, weight_D: Tensor
) -> None:
    """In place: dh += i (w g) - h i^3 mean(w g h), i the inverse root."""
    rows, columns = h_ND.shape
    block = triton.next_power_of_2(columns)
    _add_rms_norm_backward[(rows,)](
        dh_ND, grad_ND, h_ND, inverse_N1, weight_D, columns, BLOCK=block, num_warps=4
    )


def rotate(x_BTHE: Tensor, cos_TE: Tensor, sin_TE: Tensor, out_BTHE: Tensor, *, back: bool) -> None:
    """out = x cos + rotate_half(x) sin, or the transpose of that map; both may be strided but for E."""
    rows, tokens, heads, size = x_BTHE.shape
    _rotate[(rows * tokens,)](
        x_BTHE, cos_TE, sin_TE, out_BTHE, tokens, heads, *x_BTHE.stride()[:3], *out_BTHE.stride()[:3],
        HALF=size // 2, HEADS=triton.next_power_of_2(heads), LANES=triton.next_power_of_2(size // 2),
        BACK=back, num_warps=2,
    )  # fmt: skip


def swiglu_backward(
    grad_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, grad_gate_NF: Tensor, grad_up_NF: Tensor
) -> None:
    """Gradients of gate and up from that of silu(gate) * up. All are contiguous."""
    count = grad_NF.numel()
    _swiglu_backward[(triton.cdiv(count, _ELEMENTS_BLOCK),)](
        grad_NF, gate_NF, up_NF, grad_gate_NF, grad_up_NF, count, BLOCK=_ELEMENTS_BLOCK, num_warps=4
    )


def losses_and_slopes(logits_CV: Tensor, targets_C: Tensor, losses_C: Tensor, scales_C: Tensor) -> None:
    """Writes ce to `losses_C`, and over the logits scale * (softmax - onehot)."""
    labels, vocabulary = logits_CV.shape
    _losses_and_slopes[(labels,)](
        logits_CV, targets_C, losses_C, scales_C, VOCABULARY=vocabulary, BLOCK=_VOCABULARY_BLOCK, num_warps=8
    )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm(h, weight, out, inverse, columns, eps, BLOCK: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < columns
    wide = inverse.dtype.element_ty
    x = tl.load(h + row * columns + lanes, mask=inside, other=0.0).to(wide)
    root = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / columns + eps)
    tl.store(inverse + row, root)
    w = tl.load(weight + lanes, mask=inside, other=0.0).to(wide)
    tl.store(out + row * columns + lanes, (x * root * w).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _add_rms_norm_backward(dh, grad, h, inverse, weight, columns, BLOCK: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < columns
    wide = inverse.dtype.element_ty
    place = row * columns + lanes
    x = tl.load(h + place, mask=inside, other=0.0).to(wide)
    w = tl.load(weight + lanes, mask=inside, other=0.0).to(wide)
    g = tl.load(grad + place, mask=inside, other=0.0).to(wide) * w
    root = tl.load(inverse + row)
    slope = tl.sum(g * x, axis=0) * root * root * root / columns
    before = tl.load(dh + place, mask=inside, other=0.0).to(wide)
    tl.store(dh + place, (before + g * root - x * slope).to(dh.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    x, cos, sin, out, tokens, heads, x_b, x_t, x_h, out_b, out_t, out_h,
    HALF: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr, BACK: tl.constexpr,
) -> Any:  # fmt: skip
    row, token = (tl.program_id(0) // tokens).to(tl.int64), tl.program_id(0) % tokens
    head, lane = tl.arange(0, HEADS)[:, None], tl.arange(0, LANES)[None, :]
    inside = (head < heads) & (lane < HALF)
    angle = token * 2 * HALF + lane
    in_half = lane < HALF
    # The two halves of the factors differ where the model says so.
    cos_1, cos_2 = tl.load(cos + angle, mask=in_half), tl.load(cos + angle + HALF, mask=in_half)
    sin_1, sin_2 = tl.load(sin + angle, mask=in_half), tl.load(sin + angle + HALF, mask=in_half)
    source = x + row * x_b + token * x_t + head * x_h + lane
    target = out + row * out_b + token * out_t + head * out_h + lane
    x_1, x_2 = tl.load(source, mask=inside), tl.load(source + HALF, mask=inside)
    if x.dtype.element_ty != tl.float64:
        x_1, x_2 = x_1.to(tl.float32), x_2.to(tl.float32)
        cos_1, cos_2 = cos_1.to(tl.float32), cos_2.to(tl.float32)
        sin_1, sin_2 = sin_1.to(tl.float32), sin_2.to(tl.float32)
    if BACK:
        y_1, y_2 = x_1 * cos_1 + x_2 * sin_2, x_2 * cos_2 - x_1 * sin_1
    else:
        y_1, y_2 = x_1 * cos_1 - x_2 * sin_1, x_2 * cos_2 + x_1 * sin_2
    tl.store(target, y_1.to(out.dtype.element_ty), mask=inside)
    tl.store(target + HALF, y_2.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _swiglu_backward(grad, gate, up, grad_gate, grad_up, count, BLOCK: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]
    lanes = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < count
    g, a, b = (
        tl.load(grad + lanes, mask=inside),
        tl.load(gate + lanes, mask=inside),
        tl.load(up + lanes, mask=inside),
    )
    if grad.dtype.element_ty != tl.float64:
        g, a, b = g.to(tl.float32), a.to(tl.float32), b.to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-a))
    slope = s * (1.0 + a * (1.0 - s))
    tl.store(grad_up + lanes, (g * a * s).to(grad_up.dtype.element_ty), mask=inside)
    tl.store(grad_gate + lanes, (g * b * slope).to(grad_gate.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _losses_and_slopes(logits, targets, losses, scales, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    wide = losses.dtype.element_ty
    start = logits + row * VOCABULARY
    target = tl.load(targets + row)
    largest = tl.full((BLOCK,), float("-inf"), wide)
    total = tl.zeros((BLOCK,), wide)
    for first in range(0, VOCABULARY, BLOCK):
        lanes = first + tl.arange(0, BLOCK)
        z = tl.load(start + lanes, mask=lanes < VOCABULARY, other=float("-inf")).to(wide)
        higher = tl.maximum(largest, z)
        # A lane that has seen nothing yet, or only -inf, adds nothing; a NaN stays one.
        kept = tl.where(largest == float("-inf"), 0.0, total * tl.exp(largest - higher))
        total = kept + tl.where(z == float("-inf"), 0.0, tl.exp(z - higher))
        largest = higher
    peak = tl.max(largest, axis=0)
    totals = tl.where(largest == float("-inf"), 0.0, total * tl.exp(largest - peak))
    normaliser = peak + tl.log(tl.sum(totals, axis=0))
    tl.store(losses + row, normaliser - tl.load(start + target).to(wide))
    scale = tl.load(scales + row)
    for first in range(0, VOCABULARY, BLOCK):
        lanes = first + tl.arange(0, BLOCK)
        z = tl.load(start + lanes, mask=lanes < VOCABULARY, other=float("-inf")).to(wide)
        slope = (tl.exp(z - normaliser) - tl.where(lanes == target, 1.0, 0.0)) * scale
        tl.store(start + lanes, slope.to(logits.dtype.element_ty), mask=lanes < VOCABULARY)
