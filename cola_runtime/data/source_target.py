"""Prompt and completion to an encoder-decoder's row: what its encoder reads, what its decoder shall write.

Both are framed by the model's own tokenizer, as `tokenizer(prompt)` and `tokenizer(text_target=completion)`
do: T5 appends </s>, BART writes <s> ... </s>, tokenizers of language pairs add the tags of `src_lang` and
`tgt_lang`. The decoder's tokens are those labels behind its start token, so that a row gives what
`model(input_ids, labels=labels)` gives. In a tenant's text nothing is a special token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer as Backend

from cola_runtime.data.encoder import backend_of, generation_stops, load_tokenizer, unsupported
from cola_runtime.data.records import CompletionRecord
from cola_runtime.data.sequences import RowShape, check_length
from cola_runtime.data.violations import Problem, Problems
from cola_runtime.rows import Row

_BATCH_RECORDS = 512
_LANGUAGE_PAIRS = ("MBartTokenizer", "MBart50Tokenizer", "NllbTokenizer")
"""transformers' classes that frame a target otherwise than a source; without torch."""
_WRAPPING = ("mbart", "plbart", "fsmt")
"""Model types whose decoder starts with the last label, the target's language."""


class _Text(NamedTuple):
    """A framed text, cut if it was too long, and its tokens before that."""

    ids: Sequence[int]
    length: int


class SourceTargetEncoder:
    """An encoder-decoder's tokenizer. Safe to use from several threads: nothing in it changes."""

    def __init__(self, folder: Path) -> None:
        """Raises InvalidInput `TOKENIZER_UNSUPPORTED`."""
        tokenizer = _tokenizer(folder)
        if tokenizer.eos_token_id is None:
            raise unsupported(folder, "it has no end-of-text token")
        self._tokenizer = tokenizer
        self._sources, self._targets = _framings(tokenizer)
        if not self._targets.num_special_tokens_to_add(False):
            raise unsupported(folder, "it ends no text, so that no generation would end")
        self._start_id = _decoder_start(folder)
        special = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
        self._special_spelling = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self.stop_ids: tuple[int, ...] = tuple(sorted({tokenizer.eos_token_id, *generation_stops(folder)}))

    def rows(
        self, records: Sequence[CompletionRecord], shape: RowShape, problems: Problems
    ) -> tuple[list[Row], int]:
        """A row per record, and how many were cut. What is wrong with a record goes to `problems`.

        `shape` bounds the source, and the target with its start token.
        """
        rows: list[Row] = []
        cut = 0
        for record, source, labels in self._encoded(records, shape.longest):
            try:
                _check(source, labels, shape)
                rows.append(self._row(source, labels))
                cut += source.length > len(source.ids) or labels.length > len(labels.ids)
            except Problem as problem:
                problems.add(problem, line=record.line)
        return rows, cut

    def source(self, text: str) -> list[int]:
        """What the encoder reads of a prompt."""
        return list(self._sources.encode(text).ids)

    def spells_markup(self, text: str) -> bool:
        """Whether the text holds the spelling of a special token."""
        return self._special_spelling.search(text) is not None

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _encoded(
        self, records: Sequence[CompletionRecord], longest: int
    ) -> Iterator[tuple[CompletionRecord, _Text, _Text]]:
        for start in range(0, len(records), _BATCH_RECORDS):
            batch = records[start : start + _BATCH_RECORDS]
            sources = _framed(self._sources, [record.prompt for record in batch], longest)
            labels = _framed(self._targets, [record.completion for record in batch], longest - 1)
            yield from zip(batch, sources, labels, strict=True)

    def _row(self, source: _Text, labels: _Text) -> Row:
        start = labels.ids[-1] if self._start_id is None else self._start_id
        tokens = np.array([start, *labels.ids], np.int32)
        weights = np.ones(len(tokens), np.float32)
        weights[0] = 0  # the start is given, not predicted
        return Row(tokens=tokens, weights=weights, source=np.array(source.ids, np.int32))


def _check(source: _Text, labels: _Text, shape: RowShape) -> None:
    for name, length, shortest in (
        ("prompt", source.length, len(source.ids)),
        ("completion", 1 + labels.length, 1 + len(labels.ids)),
    ):
        check_length(length, shape, shortest=shortest, of=name)


def _framed(backend: Backend, texts: Sequence[str], longest: int) -> list[_Text]:
    """Too long a text loses its end, never its special tokens, and not its last token."""
    wholes = [whole.ids for whole in backend.encode_batch(list(texts))]
    found = dict(enumerate(wholes))
    long = [place for place, ids in found.items() if len(ids) > longest]
    if long:
        cutting = _copy(backend)
        cutting.enable_truncation(max(longest, 1 + cutting.num_special_tokens_to_add(False)))
        cuts = cutting.encode_batch([texts[place] for place in long])
        found.update(zip(long, (cut.ids for cut in cuts), strict=True))
    return [_Text(found[place], len(whole)) for place, whole in enumerate(wholes)]


def _copy(backend: Backend) -> Backend:
    copy = Backend.from_str(backend.to_str())
    copy.encode_special_tokens = backend.encode_special_tokens
    return copy


def _tokenizer(folder: Path) -> Any:
    """Of a language pair transformers' own class, which knows both languages; else the plain one."""
    import transformers

    plain = load_tokenizer(folder)
    name = str(_json(folder / "tokenizer_config.json").get("tokenizer_class", "")).removesuffix("Fast")
    if name not in _LANGUAGE_PAIRS:
        return plain
    return getattr(transformers, name).from_pretrained(folder, local_files_only=True)


def _framings(tokenizer: Any) -> tuple[Backend, Backend]:
    """Of sources, and of targets."""
    sources = backend_of(tokenizer, text_only=True)
    if type(tokenizer).__name__ not in _LANGUAGE_PAIRS:
        return sources, sources
    tokenizer._switch_to_target_mode()
    targets = backend_of(tokenizer, text_only=True)
    tokenizer._switch_to_input_mode()
    return sources, targets


def _decoder_start(folder: Path) -> int | None:
    """The token that every target begins behind; None: its own last label."""
    config = _json(folder / "config.json")
    if config.get("model_type") in _WRAPPING:
        return None
    for settings in (config, _json(folder / "generation_config.json")):
        start = settings.get("decoder_start_token_id")
        if isinstance(start, int):
            return start
    raise unsupported(folder, "the folder names no decoder_start_token_id")


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
