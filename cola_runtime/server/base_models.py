"""The base models that are served, by name, each with its tokenizer."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Mapping

from cola_runtime.data.tokenize import Tokenizer
from cola_runtime.errors import InvalidInput
from cola_runtime.types import BaseModelDescription


class BaseModels:
    """Looks base models up. Tokenizers are loaded once, off the event loop, when first needed."""

    def __init__(self, descriptions: Mapping[str, BaseModelDescription]) -> None:
        self._by_name = dict(descriptions)
        self._tokenizers: dict[str, asyncio.Task[Tokenizer]] = {}

    @property
    def descriptions(self) -> tuple[BaseModelDescription, ...]:
        return tuple(self._by_name.values())

    @property
    def default(self) -> str:
        """The one that is meant when none is named."""
        return next(iter(self._by_name), "")

    def find(self, name: str) -> BaseModelDescription:
        """Raises InvalidInput `BASE_MODEL_UNKNOWN`, which lists the names that are served."""
        if name in self._by_name:
            return self._by_name[name]
        near = difflib.get_close_matches(name, self._by_name, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InvalidInput(
            "BASE_MODEL_UNKNOWN",
            f"base model {name!r} is not served here{hint}",
            where="job.base_model",
            remedy=f"Served: {', '.join(self._by_name) or 'none'}. Nothing was created.",
        )

    async def tokenizer(self, name: str) -> Tokenizer:
        """Raises InvalidInput `BASE_MODEL_UNKNOWN`, `TOKENIZER_UNSUPPORTED`."""
        base = self.find(name)
        if name not in self._tokenizers:
            loading = asyncio.to_thread(Tokenizer.of, base)
            self._tokenizers[name] = asyncio.create_task(loading)
        return await asyncio.shield(self._tokenizers[name])
