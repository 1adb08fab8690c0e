"""The base models that are served, by name, each with its tokenizer."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Mapping

from cola_runtime.data.tokenize import Tokenizer
from cola_runtime.errors import InvalidInput
from cola_runtime.gradients.planner import Costs
from cola_runtime.types import BaseModelDescription


class BaseModels:
    """Looks base models up."""

    def __init__(self, descriptions: Mapping[str, BaseModelDescription], costs: Mapping[str, Costs]) -> None:
        """`costs`: what the encodings of jobs' taps are planned by, where it is known."""
        self._by_name = dict(descriptions)
        self._costs = dict(costs)

    @property
    def descriptions(self) -> tuple[BaseModelDescription, ...]:
        return tuple(self._by_name.values())

    @property
    def default(self) -> str:
        """The one that is meant when none is named."""
        return next(iter(self._by_name), "")

    def costs(self, name: str) -> Costs:
        return self._costs.get(name, Costs())

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
        """Read off the event loop when first needed.

        Raises InvalidInput `BASE_MODEL_UNKNOWN`, `TOKENIZER_UNSUPPORTED`.
        """
        return await asyncio.to_thread(Tokenizer.of, self.find(name))
