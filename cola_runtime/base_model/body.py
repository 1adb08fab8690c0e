"""From tokens to the last hidden state and back: what computes a mixed batch's forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor

from cola_runtime.base_model.accelerator import Accelerator
from cola_runtime.base_model.segments import MixedBatch
from cola_runtime.base_model.stacks.cohorts import Stacks
from cola_runtime.base_model.tapped import TappedModules


class Body(Protocol):
    """One step is `forward`, then `backward` if it trains, then `finish`, whatever happened before."""

    def forward(self, batch: MixedBatch, stacks: Stacks, *, train: bool) -> Tensor:
        """The last hidden state [B*T, D]; valid until `finish`."""

    def backward(self, grad_ND: Tensor) -> None:
        """From d loss / d hidden down to the lowest adapted site; hands out the taps, deepest layer first."""

    def finish(self) -> None:
        """Let go of everything that belongs to the step."""


LastHidden = Callable[[MixedBatch], Tensor]
"""A stock model's forward: the last hidden state [B, T, D] of a batch."""


class PatchedBody:
    """Any transformers model: its own forward, with the sites' modules patched, and autograd."""

    def __init__(self, last_hidden: LastHidden, modules: TappedModules) -> None:
        self._last_hidden = last_hidden
        self._modules = modules
        self._step = ExitStack()  # the modules compute this step's adapters, also when they do so again
        self._hidden_ND: Tensor | None = None

    def forward(self, batch: MixedBatch, stacks: Stacks, *, train: bool) -> Tensor:
        self._step.enter_context(self._modules.active(stacks, rows=len(batch.tokens_BT), training=train))
        with torch.set_grad_enabled(train):
            self._hidden_ND = self._last_hidden(batch).flatten(0, 1)
        return self._hidden_ND.detach()

    def backward(self, grad_ND: Tensor) -> None:
        assert self._hidden_ND is not None
        torch.autograd.backward(self._hidden_ND, grad_ND)

    def finish(self) -> None:
        self._hidden_ND = None
        self._step.close()


def causal_hidden(model: Any, batch: MixedBatch) -> Tensor:
    """Padding is on the right, where causal attention never looks: every position counts as real."""
    tokens_BT = batch.tokens_BT
    hidden_BTD: Tensor = model.base_model(
        input_ids=tokens_BT, attention_mask=torch.ones_like(tokens_BT), use_cache=False
    ).last_hidden_state
    return hidden_BTD


def encoder_hidden(model: Any, batch: MixedBatch) -> Tensor:
    """Attention looks both ways, so the padding is masked."""
    tokens_BT = batch.tokens_BT
    lengths_B = Accelerator(tokens_BT.device).placed(torch.from_numpy(batch.lengths))
    real_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) < lengths_B[:, None]
    hidden_BTD: Tensor = model.base_model(
        input_ids=tokens_BT,
        attention_mask=real_BT.long(),
        token_type_ids=batch.token_types_BT,
        use_cache=False,
    ).last_hidden_state
    return hidden_BTD
