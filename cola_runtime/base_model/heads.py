"""A tenant's head in the bank, where its rows are pooled, and its loss with all gradients.

Shapes: B rows of the batch, T tokens, n rows of one segment, D hidden size, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cola_runtime.adapter_spec import AdapterSpec, HeadKind
from cola_runtime.base_model.accelerator import HOST, Accelerator
from cola_runtime.types import TensorKey, TensorKind


@dataclass(frozen=True, slots=True, eq=False)
class Pooling:
    """Which hidden state stands for a row: what the architecture's own classification model takes.

    Encoders: the first token, in BERT through the checkpoint's own pooler (dense, tanh). Decoders: the last
    real token. `module` is frozen, and maps [n, 1, D] to [n, D].
    """

    first_token: bool
    module: Any = None

    def positions(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of each row, its place in the batch's flattened [B * T]."""
        return starts if self.first_token else starts + lengths - 1

    def pooled(self, hidden_nD: Tensor) -> Tensor:
        """[n, D]; differentiable."""
        if self.module is None:
            return hidden_nD
        pooled_nD: Tensor = self.module(hidden_nD.unsqueeze(1))
        return pooled_nD


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadGradients:
    """Of sum(losses) / loss_denominator."""

    weight_CD: Tensor
    bias_C: Tensor
    hidden_nD: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BankedHead:
    """One version of one head, in the adapter's own dtype, float32 or float64, whatever the base model's."""

    kind: HeadKind
    site: int
    weight_CD: Tensor
    bias_C: Tensor

    @staticmethod
    def of(
        spec: AdapterSpec, weights: Mapping[TensorKey, Tensor], accelerator: Accelerator = HOST
    ) -> BankedHead | None:
        """A copy of the head's weights; None where the adapter has no head."""
        if spec.head is None:
            return None
        kind, site = spec.head
        weight_CD, bias_C = (
            accelerator.placed(weights[TensorKey(site.index, tensor)].clone())
            for tensor in (TensorKind.WEIGHT, TensorKind.BIAS)
        )
        return BankedHead(kind=kind, site=site.index, weight_CD=weight_CD, bias_C=bias_C)

    @property
    def nbytes(self) -> int:
        return self.weight_CD.nbytes + self.bias_C.nbytes

    def losses(self, hidden_nD: Tensor, labels: Sequence[float], pooling: Pooling) -> tuple[Tensor, Tensor]:
        """Each row's loss [n] (cross-entropy, or squared error) and prediction [n]: a class, or a value."""
        with torch.no_grad():
            logits_nC = self._logits(pooling.pooled(hidden_nD), self.weight_CD, self.bias_C)
            losses_n = self._losses(logits_nC, labels)
        regression = self.kind.problem == "regression"
        return losses_n, logits_nC.squeeze(1) if regression else logits_nC.argmax(dim=1)

    def gradients(
        self, hidden_nD: Tensor, labels: Sequence[float], pooling: Pooling, loss_denominator: float
    ) -> tuple[Tensor, HeadGradients]:
        """Each row's loss [n], and what autograd makes of so small a graph."""
        with torch.enable_grad():
            leaves = [
                tensor.detach().requires_grad_(True) for tensor in (hidden_nD, self.weight_CD, self.bias_C)
            ]
            losses_n = self._losses(self._logits(pooling.pooled(leaves[0]), *leaves[1:]), labels)
            of_hidden, of_weight, of_bias = torch.autograd.grad(losses_n.sum() / loss_denominator, leaves)
        gradients = HeadGradients(weight_CD=of_weight, bias_C=of_bias, hidden_nD=of_hidden)
        return losses_n.detach(), gradients

    def _logits(self, pooled_nD: Tensor, weight_CD: Tensor, bias_C: Tensor) -> Tensor:
        return functional.linear(pooled_nD.to(weight_CD.dtype), weight_CD, bias_C)

    def _losses(self, logits_nC: Tensor, labels: Sequence[float]) -> Tensor:
        if self.kind.problem == "regression":
            targets_n = _placed(torch.tensor(labels, dtype=logits_nC.dtype), logits_nC)
            return functional.mse_loss(logits_nC.squeeze(1), targets_n, reduction="none")
        targets_n = _placed(torch.tensor(labels, dtype=torch.int64), logits_nC)
        return functional.cross_entropy(logits_nC, targets_n, reduction="none")


def _placed(tensor: Tensor, like: Tensor) -> Tensor:
    return Accelerator(like.device).placed(tensor)
