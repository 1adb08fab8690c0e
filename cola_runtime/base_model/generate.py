"""Token by token, with a key-value cache; whichever adapter is active in the patched modules takes part.

Transformers' own `generate` with one beam. Prompts of several lengths go together: a decoder's are padded on
the left and an encoder's sources on the right, and masked. Shapes: B prompts, T of the longest one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cola_runtime.base_model.load import LoadedModel
from cola_runtime.errors import InvalidInput

_SAMPLERS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Temperature 0 is greedy; equal seeds give equal tokens."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop_ids: Collection[int] = field(default_factory=frozenset)


def check_prompt(loaded: LoadedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raises InvalidInput `PROMPT_EMPTY`, `SEQUENCE_TOO_LONG`, `TASK_UNSUPPORTED`."""
    if loaded.bidirectional:
        raise InvalidInput(
            "TASK_UNSUPPORTED",
            f"{type(loaded.model).__name__} predicts no tokens and generates nothing",
            where="base_model",
            remedy="Ask a causal language model.",
        )
    if prompt_tokens == 0:
        raise InvalidInput("PROMPT_EMPTY", "the prompt has no tokens", where="prompt")
    total = prompt_tokens + max_new_tokens
    if loaded.encoder_decoder:
        total = max(prompt_tokens, 1 + max_new_tokens)  # each beside its own positions
    if total > loaded.context_length:
        raise InvalidInput(
            "SEQUENCE_TOO_LONG",
            f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones do not fit the context",
            where="prompt",
            limit=loaded.context_length,
            actual=total,
            remedy="Shorten the prompt or ask for fewer tokens.",
        )


def keep_own_settings_only(model: Any) -> None:
    """Set what `generate` takes from the model where a call leaves it open.

    A decoder's text is continued by its logits alone. An encoder-decoder keeps its folder's settings (its
    start, forced or forbidden tokens, repeated n-grams) but for beams and sampling, as `generate` with one
    beam does; what ends a text is always the caller's to say.
    """
    from transformers import GenerationConfig

    config = model.generation_config if model.config.is_encoder_decoder else GenerationConfig()
    config.update(
        num_beams=1,
        do_sample=False,
        early_stopping=False,
        length_penalty=1.0,
        max_length=None,
        eos_token_id=None,
        **dict.fromkeys(_SAMPLERS),
    )
    if config.pad_token_id is None:
        config.pad_token_id = 0
    model.generation_config = config


@torch.no_grad()
def generate_tokens(model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """The new tokens of each prompt, without the stop token that ended them.

    A decoder continues a prompt; an encoder-decoder reads it as its source.
    """
    padded = _padded(prompts, left=not model.config.is_encoder_decoder)
    tokens_BT, real_BT = (tensor.to(model.device) for tensor in padded)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        generated_BT = model.generate(
            input_ids=tokens_BT,
            attention_mask=real_BT,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(sampling.stop_ids) or None,
            **_by_chance(sampling),
        )
    first = 1 if model.config.is_encoder_decoder else tokens_BT.shape[1]
    return [_until_stop(row, sampling.stop_ids) for row in generated_BT[:, first:].tolist()]


def _by_chance(sampling: Sampling) -> dict[str, Any]:
    """From the whole distribution: neither the likeliest few nor those of most weight."""
    if sampling.temperature <= 0:
        return {}
    return {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}


def _padded(prompts: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Tokens and 1 where they are real, both int64 [B, T]."""
    shape = len(prompts), max(map(len, prompts))
    tokens_BT, real_BT = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        places = slice(shape[1] - len(prompt), None) if left else slice(len(prompt))
        tokens_BT[row, places] = torch.tensor(list(prompt))
        real_BT[row, places] = 1
    return tokens_BT, real_BT


def _until_stop(tokens: Sequence[int], stop_ids: Collection[int]) -> list[int]:
    """Behind a stop token there is only padding."""
    end = next((place for place, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return list(tokens[:end])
