"""A base model's tokenizer in two voices: for text, where nothing is special, and for a template's markup.

Wraps transformers' fast tokenizer, without torch, without the hub and without code from the model's folder.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from cola_runtime.data.records import Message
from cola_runtime.data.template import ChatTemplate, Piece
from cola_runtime.errors import InvalidInput

_CACHED_MARKUP = 4096
_NO_TEXT = secrets.token_hex(16)  # in front of a piece's name: nobody can guess it
_PROBES = ("\n", "a b", "\nc", " d", "ü")


class Encoder:
    """Pieces to token ids. Safe to use from several threads: nothing in it changes after it was made."""

    def __init__(self, folder: Path) -> None:
        """Raises InvalidInput `TOKENIZER_UNSUPPORTED`."""
        self._tokenizer = load_tokenizer(folder)
        if self._tokenizer.eos_token_id is None:
            raise unsupported(folder, "it has no end-of-text token")
        self._markup = backend_of(self._tokenizer, text_only=False)
        self._text = backend_of(self._tokenizer, text_only=True)
        self._check_pieces_add_up(folder)
        self._markup_ids = functools.lru_cache(_CACHED_MARKUP)(self._encode_markup)
        special = {number: str(t) for number, t in self._tokenizer.added_tokens_decoder.items() if t.special}
        self._special_ids = frozenset(special)
        self._special_spelling = re.compile("|".join(map(re.escape, special.values())) or "(?!)")
        self.template = ChatTemplate(self._render) if self._tokenizer.chat_template else None
        self.prefix = self._find_prefix()  # markup that every plain text begins with, often none
        self.end = str(self._tokenizer.eos_token)  # markup that every plain text ends with
        self.turn_end_id = self._find_turn_end()  # None: the template doesn't mark the end of an answer
        stops = {self._tokenizer.eos_token_id, self.turn_end_id, *generation_stops(folder)}
        self.stop_ids: tuple[int, ...] = tuple(sorted(stops - {None}))

    def ids(self, pieces: Sequence[Piece]) -> list[Sequence[int]]:
        """One sequence of tokens per piece."""
        texts = self._text.encode_batch_fast(
            [p.text for p in pieces if not p.is_markup], add_special_tokens=False
        )
        encoded = iter(texts)
        return [self._markup_ids(p.text) if p.is_markup else next(encoded).ids for p in pieces]

    def chat_template(self) -> ChatTemplate:
        """Raises InvalidInput `TEMPLATE_MISSING` if the base model has none."""
        if self.template is None:
            raise InvalidInput(
                "TEMPLATE_MISSING",
                "the base model has no chat template, so it takes no messages",
                remedy="Use prompt and completion or text, or a base model made for chat.",
            )
        return self.template

    def labels(self, piece: Piece, ids: Sequence[int]) -> int:
        """How many of a piece's tokens are to be learnt: of an answer all, of markup up to the turn's end."""
        if not piece.is_answer:
            return 0
        if not piece.is_markup:
            return len(ids)
        ends = (self.turn_end_id, self._tokenizer.eos_token_id)
        return next((place + 1 for place, token in enumerate(ids) if token in ends), 0)

    def spells_markup(self, text: str) -> bool:
        """Whether the text holds the spelling of a special token."""
        return self._special_spelling.search(text) is not None

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _encode_markup(self, text: str) -> tuple[int, ...]:
        return tuple(self._markup.encode(text, add_special_tokens=False).ids)

    def _render(self, messages: Sequence[Message], answer: bool) -> str:
        plain = [{"role": message.role, "content": message.content} for message in messages]
        return str(self._tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=answer))

    def _find_prefix(self) -> str:
        bare = self._markup.encode("a", add_special_tokens=False).tokens
        whole = self._markup.encode("a", add_special_tokens=True).tokens
        return "".join(whole[: whole.index(bare[0])])

    def _find_turn_end(self) -> int | None:
        """The first special token after the answer of a conversation that ends there."""
        if self.template is None:
            return None
        ids = self._markup_ids(self.template.after_answer())
        return next((token for token in ids if token in self._special_ids), None)

    def _check_pieces_add_up(self, folder: Path) -> None:
        """Pieces are encoded apart, so the tokenizer must put nothing in front of a text of its own."""
        apart = [
            token for probe in _PROBES for token in self._text.encode(probe, add_special_tokens=False).ids
        ]
        if self._text.encode("".join(_PROBES), add_special_tokens=False).ids != apart:
            raise unsupported(folder, "it changes the start of a text")


def load_tokenizer(folder: Path) -> Any:
    """transformers' fast tokenizer. Raises InvalidInput `TOKENIZER_UNSUPPORTED`."""
    from transformers import PreTrainedTokenizerFast  # heavy, and not needed to import this module

    if not (folder / "tokenizer.json").is_file():
        raise unsupported(folder, "there is no tokenizer.json")
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def backend_of(tokenizer: Any, *, text_only: bool) -> Backend:
    """A copy that neither cuts nor pads; with `text_only` the spelling of a special token is plain text."""
    written = tokenizer.backend_tokenizer.to_str()
    backend = Backend.from_str(_without_control_pieces(written) if text_only else written)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = text_only
    return backend


def _without_control_pieces(written: str) -> str:
    """A Unigram model has `</s>` among its pieces and finds it in a text, even where nothing is special.

    Its special pieces keep their numbers, under names that no text can have.
    """
    fields = json.loads(written)
    if fields["model"]["type"] != "Unigram":
        return written
    special = {token["content"] for token in fields["added_tokens"] if token["special"]}
    fields["added_tokens"] = [t for t in fields["added_tokens"] if t["content"] not in special]
    for piece in fields["model"]["vocab"]:
        if piece[0] in special:
            piece[0] = f"{_NO_TEXT}{piece[0]}"
    return json.dumps(fields)


def generation_stops(folder: Path) -> set[int]:
    """The ids that the model's own generation settings stop at."""
    path = folder / "generation_config.json"
    ids = json.loads(path.read_text("utf-8")).get("eos_token_id") if path.is_file() else None
    if ids is None:
        return set()
    return set(ids) if isinstance(ids, list) else {ids}


def unsupported(folder: Path, cause: str) -> InvalidInput:
    return InvalidInput(
        "TOKENIZER_UNSUPPORTED",
        f"the tokenizer of base model {folder.name!r} can't be used: {cause}",
        remedy="Use a base model with a byte-level tokenizer.json.",
    )
