"""Cross-entropy of the labelled positions only, in chunks, with its gradient by the hidden states.

Shapes: N = rows x tokens, D hidden size, K labels, C labels of one chunk, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cola_runtime.base_model.frozen_products import FrozenProduct, fastest_product
from cola_runtime.base_model.segments import Labels
from cola_runtime.base_model.whole_tiles import whole_rows
from cola_runtime.base_model.workspace import Workspace

CHUNK_LABELS = 512  # of one product; 100 MB of float32 logits for a vocabulary of 49,152
CUDA_CHUNK_LABELS = 4096
BLOCK_LABELS = 8  # of one softmax: what it reads twice stays in the cache


@dataclass(frozen=True, slots=True)
class VocabularyProjection:
    """logits = scale h W^T + b, the frozen head of the base model."""

    weight_VD: Tensor
    bias_V: Tensor | None
    product: FrozenProduct
    hidden_scale: float = 1.0

    @staticmethod
    def of(model: Any, *, hidden_scale: float = 1.0, keep_tiles: bool = False) -> VocabularyProjection:
        """That of any of transformers' models. `keep_tiles`: as `fastest_product`."""
        head = model.get_output_embeddings()
        biases = [getattr(head, "bias", None), getattr(model, "final_logits_bias", None)]
        given = [bias.detach().reshape(-1) for bias in biases if bias is not None]
        weight_VD, bias_V = head.weight.detach(), sum(given) if given else None
        make = fastest_product(weight_VD, keep_tiles=keep_tiles)
        product = make(weight_VD, bias_V, [len(weight_VD)])
        return VocabularyProjection(weight_VD, bias_V, product, hidden_scale)


def label_loss(
    hidden_ND: Tensor, head: VocabularyProjection | None, labels: Labels, space: Workspace, *, train: bool
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of every label [K] in at least float32, and d(sum scale * ce)/d hidden [N, D] if `train`.

    A base model without a vocabulary projection has no labels, and gets zeros.
    Never holds the logits of more than CHUNK_LABELS labels (CUDA_CHUNK_LABELS on such a device). Every row's
    result depends on that row alone.
    """
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    losses_K = hidden_ND.new_empty(len(labels.targets_K), dtype=wide)
    grad_ND = space.tensor("loss.grad", tuple(hidden_ND.shape), hidden_ND.dtype).zero_() if train else None
    chunk_labels = CUDA_CHUNK_LABELS if hidden_ND.is_cuda else CHUNK_LABELS
    losses_and_slopes = _cuda_losses_and_slopes if hidden_ND.is_cuda else _losses_and_slopes
    for start in range(0, len(losses_K), chunk_labels):
        assert head is not None  # `row_refusal` has looked
        chunk = slice(start, start + chunk_labels)
        positions_C = labels.positions_K[chunk]
        whole_LD = _scaled(_labelled(hidden_ND, positions_C, space), head)
        whole_LV = head.product.project(whole_LD, space, "loss.logits")
        logits_CV = whole_LV[: len(positions_C)]
        scales_C = labels.scales_K[chunk].to(wide) * head.hidden_scale
        losses_and_slopes(logits_CV, labels.targets_K[chunk], losses_K[chunk], scales_C, space)
        if grad_ND is not None:
            grad_LD = head.product.gradient(whole_LV, space, "loss.hidden_gradient")
            grad_ND.index_copy_(0, positions_C, grad_LD[: len(positions_C)])
    return losses_K, grad_ND


def segment_loss_sums(losses_K: Tensor, labels: Labels) -> list[tuple[float, float]]:
    """(sum of weight * ce, sum of weight) of each member, summed in float64 over its own slice only."""
    weighted_K = losses_K.to(torch.float64) * labels.weights_K
    sums = [float(part.sum()) for part in torch.split(weighted_K, list(labels.counts))]
    weights = [float(part.sum()) for part in torch.split(labels.weights_K, list(labels.counts))]
    return list(zip(sums, weights, strict=True))


def _labelled(hidden_ND: Tensor, positions_C: Tensor, space: Workspace) -> Tensor:
    """The hidden states of the labels; rows that make the processor's tiles whole behind them."""
    shape = whole_rows(len(positions_C), hidden_ND), hidden_ND.shape[1]
    hidden_LD = space.tensor("loss.hidden", shape, hidden_ND.dtype)
    torch.index_select(hidden_ND, 0, positions_C, out=hidden_LD[: len(positions_C)])
    return hidden_LD


def _scaled(hidden_CD: Tensor, head: VocabularyProjection) -> Tensor:
    return hidden_CD if head.hidden_scale == 1.0 else hidden_CD.mul_(head.hidden_scale)


def _losses_and_slopes(
    logits_CV: Tensor, targets_C: Tensor, losses_C: Tensor, scales_C: Tensor, space: Workspace
) -> None:
    """Writes ce to `losses_C`, and over the logits scale * d ce / d logits = scale * (softmax - onehot).

    Scaled before it is rounded to the logits' dtype, in which small probabilities would be lost.
    """
    for start in range(0, len(logits_CV), BLOCK_LABELS):
        block = slice(start, start + BLOCK_LABELS)
        logits_LV, targets_L1 = logits_CV[block], targets_C[block, None]
        wide_LV, slopes_LV = (
            space.tensor(f"loss.{name}", tuple(logits_LV.shape), losses_C.dtype)
            for name in ("wide", "slopes")
        )
        torch.softmax(wide_LV.copy_(logits_LV), dim=1, out=slopes_LV)
        target_L1 = slopes_LV.gather(1, targets_L1)
        losses_C[block] = -target_L1.log().squeeze(1)
        _repair_underflow(wide_LV, targets_L1.squeeze(1), target_L1.squeeze(1), losses_C[block])
        slopes_LV.scatter_(1, targets_L1, target_L1 - 1)
        logits_LV.copy_(slopes_LV.mul_(scales_C[block, None]))


def _cuda_losses_and_slopes(
    logits_CV: Tensor, targets_C: Tensor, losses_C: Tensor, scales_C: Tensor, _space: Workspace
) -> None:
    """`_losses_and_slopes` as one kernel, which nobody waits for."""
    from cola_runtime.base_model import cuda_ops

    cuda_ops.losses_and_slopes(logits_CV, targets_C, losses_C, scales_C)


def _repair_underflow(logits_LV: Tensor, targets_L: Tensor, target_L: Tensor, losses_L: Tensor) -> None:
    """Where the target's probability has lost its digits, take the loss from the logits."""
    lost = (target_L < torch.finfo(target_L.dtype).tiny * 2**24).nonzero().squeeze(1)
    if len(lost):
        losses_L[lost] = functional.cross_entropy(logits_LV[lost], targets_L[lost], reduction="none")
