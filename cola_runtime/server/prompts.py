"""Prompts to tokens and back, within the limits of the base model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cola_runtime.data.records import read_prompt_messages
from cola_runtime.data.tokenize import Tokenizer
from cola_runtime.errors import InvalidInput
from cola_runtime.server.base_models import BaseModels
from cola_runtime.server.limits import Limits

DEFAULT_NEW_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    tokenizer: Tokenizer
    token_ids: list[int]
    max_new_tokens: int  # what was asked for, as far as the context has room
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    text: str
    prompt_tokens: int
    completion_tokens: int
    adapter_version: int  # 0: the bare base model, or an adapter before its first step


class Prompts:
    """Encodes what to continue and decodes what came."""

    def __init__(self, base_models: BaseModels, limits: Limits) -> None:
        self._base_models = base_models
        self._limits = limits

    async def encode(
        self, base_model: str, prompt: Any, *, max_new_tokens: int, temperature: float
    ) -> EncodedPrompt:
        """`prompt` is a text, or decoded JSON that should be a list of messages.

        Raises InvalidInput: PROMPT_EMPTY, PROMPT_TOO_LONG, MESSAGES_INVALID, GENERATION_INVALID.
        """
        self._check(prompt, max_new_tokens, temperature)
        base = self._base_models.find(base_model)
        tokenizer = await self._base_models.tokenizer(base_model)
        question = prompt if isinstance(prompt, str) else read_prompt_messages(prompt)
        token_ids = await asyncio.to_thread(tokenizer.encode_prompt, question)
        longest = base.context_length - (0 if base.encoder_decoder else 1)
        if len(token_ids) > longest:
            raise InvalidInput(
                "PROMPT_TOO_LONG",
                f"the prompt fills the context of {base_model}",
                where="prompt",
                limit=f"{longest} tokens",
                actual=f"{len(token_ids)} tokens",
                remedy="Shorten the prompt.",
            )
        room = base.context_length - (1 if base.encoder_decoder else len(token_ids))
        return EncodedPrompt(
            tokenizer=tokenizer,
            token_ids=token_ids,
            max_new_tokens=min(max_new_tokens or DEFAULT_NEW_TOKENS, room),
            stop_ids=tokenizer.stop_ids,
        )

    async def decode(self, prompt: EncodedPrompt, tokens: Sequence[int], version: int) -> Completion:
        """The answer; a stop token at its end is no text."""
        text = await asyncio.to_thread(prompt.tokenizer.decode, tokens)
        return Completion(
            text=text,
            prompt_tokens=len(prompt.token_ids),
            completion_tokens=len(tokens),
            adapter_version=version,
        )

    def _check(self, prompt: Any, max_new_tokens: int, temperature: float) -> None:
        if prompt == "":
            raise InvalidInput("PROMPT_EMPTY", "there is no prompt", where="prompt", remedy="Give a text.")
        if len(str(prompt)) > self._limits.prompt_bytes:
            raise InvalidInput(
                "PROMPT_TOO_LONG", "the prompt is too long", where="prompt", limit=self._limits.prompt_bytes
            )
        if max_new_tokens > self._limits.new_tokens:
            raise InvalidInput(
                "GENERATION_INVALID",
                "more new tokens than one call may generate",
                where="max_new_tokens",
                limit=self._limits.new_tokens,
                actual=max_new_tokens,
                remedy="Ask for fewer.",
            )
        if not math.isfinite(temperature) or not 0 <= temperature <= self._limits.temperature:
            raise InvalidInput(
                "GENERATION_INVALID",
                "the temperature is out of range",
                where="temperature",
                limit=f"0 to {self._limits.temperature:g}",
                actual=temperature,
                remedy="0 takes the likeliest token each time.",
            )
