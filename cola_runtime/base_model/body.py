"""From tokens to the last hidden state and back: what computes a mixed batch's forward and backward."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from cola_runtime.base_model.stacks.cache import Stacks
from cola_runtime.base_model.tapped import TappedModules


class Body(Protocol):
    """One step is `forward`, then `backward` if it trains, then `finish`, whatever happened before."""

    def forward(self, tokens_BT: Tensor, stacks: Stacks, *, train: bool) -> Tensor:
        """The last hidden state [B*T, D]; valid until `finish`."""

    def backward(self, grad_ND: Tensor) -> None:
        """From d loss / d hidden down to the lowest adapted site; hands out the taps, deepest layer first."""

    def finish(self) -> None:
        """Let go of everything that belongs to the step."""


class PatchedBody:
    """Any transformers model: its own forward, with the sites' modules patched, and autograd."""

    def __init__(self, model: Any, modules: TappedModules) -> None:
        self._model = model
        self._modules = modules
        self._hidden_ND: Tensor | None = None

    def forward(self, tokens_BT: Tensor, stacks: Stacks, *, train: bool) -> Tensor:
        with self._modules.active(stacks, rows=len(tokens_BT), training=train), torch.set_grad_enabled(train):
            # Padding is on the right, where causal attention never looks: every position counts as real.
            output = self._model.base_model(
                input_ids=tokens_BT, attention_mask=torch.ones_like(tokens_BT), use_cache=False
            )
        self._hidden_ND = output.last_hidden_state.flatten(0, 1)
        return self._hidden_ND.detach()

    def backward(self, grad_ND: Tensor) -> None:
        assert self._hidden_ND is not None
        torch.autograd.backward(self._hidden_ND, grad_ND)

    def finish(self) -> None:
        self._hidden_ND = None
