"""From tokens to the last hidden state and back: what computes a mixed batch's forward and backward."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from cola_runtime.base_model.segments import MixedBatch
from cola_runtime.base_model.stacks.cache import Stacks
from cola_runtime.base_model.tapped import TappedModules


class Body(Protocol):
    """One step is `forward`, then `backward` if it trains, then `finish`, whatever happened before."""

    def forward(self, batch: MixedBatch, stacks: Stacks, *, train: bool) -> Tensor:
        """The last hidden state [B*T, D]; valid until `finish`."""

    def backward(self, grad_ND: Tensor) -> None:
        """From d loss / d hidden down to the lowest adapted site; hands out the taps, deepest layer first."""

    def finish(self) -> None:
        """Let go of everything that belongs to the step."""


class PatchedBody:
    """Any transformers model: its own forward, with the sites' modules patched, and autograd."""

    def __init__(self, model: Any, modules: TappedModules, *, bidirectional: bool) -> None:
        self._model = model
        self._bidirectional = bidirectional
        self._modules = modules
        self._hidden_ND: Tensor | None = None

    def forward(self, batch: MixedBatch, stacks: Stacks, *, train: bool) -> Tensor:
        active = self._modules.active(stacks, rows=len(batch.tokens_BT), training=train)
        with active, torch.set_grad_enabled(train):
            output = self._model.base_model(**self._inputs(batch), use_cache=False)
        self._hidden_ND = output.last_hidden_state.flatten(0, 1)
        return self._hidden_ND.detach()

    def backward(self, grad_ND: Tensor) -> None:
        assert self._hidden_ND is not None
        torch.autograd.backward(self._hidden_ND, grad_ND)

    def finish(self) -> None:
        self._hidden_ND = None

    def _inputs(self, batch: MixedBatch) -> dict[str, Tensor | None]:
        tokens_BT = batch.tokens_BT
        if not self._bidirectional:
            # Padding is on the right, where causal attention never looks: every position counts as real.
            return {"input_ids": tokens_BT, "attention_mask": torch.ones_like(tokens_BT)}
        real_BT = torch.arange(tokens_BT.shape[1]) < batch.lengths_B[:, None]
        return {
            "input_ids": tokens_BT,
            "attention_mask": real_BT.long(),
            "token_type_ids": batch.token_types_BT,
        }
