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
    """The new tokens, without the stop token that ended them.

    A decoder continues `token_ids`; an encoder-decoder reads them as its source.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    tokens: list[int] = []
    step, step_input = _first_step(model, torch.tensor([list(token_ids)]))
    cache = None
    for _ in range(sampling.max_new_tokens):
        output = step(step_input, cache)
        token = _choose(output.logits[0, -1], sampling.temperature, generator)
        if token in sampling.stop_ids:
            break
        tokens.append(token)
        step_input, cache = torch.tensor([[token]]), output.past_key_values
    return tokens


def _first_step(model: Any, tokens_1T: Tensor) -> tuple[Any, Tensor]:
    """(step, its first input); a step maps tokens and cache to the model's output."""
    if not model.config.is_encoder_decoder:
        return (
            lambda tokens, cache: model(
                input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
            ),
            tokens_1T,
        )
    encoded = model.get_encoder()(input_ids=tokens_1T)
    return (
        lambda tokens, cache: model(
            encoder_outputs=encoded, decoder_input_ids=tokens, past_key_values=cache, use_cache=True
        ),
        torch.tensor([[model.config.decoder_start_token_id]]),
    )


def _choose(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature <= 0.0:
        return int(logits_V.argmax())
    probabilities_V = torch.softmax(logits_V.double() / temperature, dim=0)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
