"""Token by token, with a key-value cache; whichever adapter is active in the patched modules takes part."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Temperature 0 is greedy; equal seeds give equal tokens."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop_ids: Collection[int] = field(default_factory=frozenset)


@torch.no_grad()
def generate_tokens(model: Any, token_ids: Sequence[int], sampling: Sampling) -> list[int]:
    """The new tokens, without the stop token that ended them."""
    generator = torch.Generator().manual_seed(sampling.seed)
    tokens: list[int] = []
    step_input, cache = torch.tensor([list(token_ids)]), None
    for _ in range(sampling.max_new_tokens):
        output = model(input_ids=step_input, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = _choose(output.logits[0, -1], sampling.temperature, generator)
        if token in sampling.stop_ids:
            break
        tokens.append(token)
        step_input, cache = torch.tensor([[token]]), output.past_key_values
    return tokens


def _choose(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature <= 0.0:
        return int(logits_V.argmax())
    probabilities_V = torch.softmax(logits_V.double() / temperature, dim=0)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
