"""Labelled records to token rows: what a task's head judges is the whole row.

An encoder frames texts with its tokenizer's own special tokens, `[CLS] a [SEP] b [SEP]`. A decoder reads a
plain text, of a pair both with a line break between, and then the end of text, which is the token that is
pooled. In a tenant's text nothing is a special token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cola_runtime.data.encoder import Encoder, backend_of, load_tokenizer, unsupported
from cola_runtime.data.labels import label_value
from cola_runtime.data.records import LabelledRecord
from cola_runtime.data.template import Piece
from cola_runtime.data.violations import Problem, Problems
from cola_runtime.rows import Row
from cola_runtime.task_spec import LabelledTask

PAIR_SEPARATOR = "\n"  # between a decoder's two texts

_BATCH_RECORDS = 512
_NO_WEIGHTS = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A record's tokens, cut where that was asked for and possible."""

    ids: Sequence[int]
    types: Sequence[int] | None
    length: int  # before the cut


class SequenceEncoder(Protocol):
    """A base model's way to frame texts."""

    def encode(self, records: Sequence[LabelledRecord], *, longest: int) -> list[Encoded]:
        """Cut texts, never special tokens, until a row has `longest` tokens or no text is left."""

    def spells_markup(self, text: str) -> bool:
        """Whether the text holds the spelling of a special token."""


class FramedSequences:
    """`SequenceEncoder` of encoders."""

    def __init__(self, folder: Path) -> None:
        """Raises InvalidInput `TOKENIZER_UNSUPPORTED`."""
        tokenizer = load_tokenizer(folder)
        self._backend = backend_of(tokenizer, text_only=True)
        if not self._backend.num_special_tokens_to_add(False):
            raise unsupported(folder, "it puts no special tokens around a text")
        special = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
        self._special_spelling = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def encode(self, records: Sequence[LabelledRecord], *, longest: int) -> list[Encoded]:
        texts = [record.text if record.text_pair is None else record.texts for record in records]
        wholes = self._backend.encode_batch(texts)
        cut = self._cut([t for t, w in zip(texts, wholes, strict=True) if len(w) > longest], longest)
        return [_encoded(whole if len(whole) <= longest else next(cut), len(whole)) for whole in wholes]

    def spells_markup(self, text: str) -> bool:
        return self._special_spelling.search(text) is not None

    def _cut(self, texts: Sequence[str | tuple[str, ...]], longest: int) -> Iterator[Any]:
        """Of a pair the longer text loses its end first. No shorter than the special tokens and one more."""
        if not texts:
            return
        # A copy, since other threads use the backend as it is; one for all texts, since it takes 0.1 s.
        backend = type(self._backend).from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        for text in texts:
            most = max(longest, 1 + backend.num_special_tokens_to_add(not isinstance(text, str)))
            backend.enable_truncation(most, strategy="longest_first")
            yield from backend.encode_batch([text])


class PlainSequences:
    """`SequenceEncoder` of decoders."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def encode(self, records: Sequence[LabelledRecord], *, longest: int) -> list[Encoded]:
        pieces = [self._pieces(record) for record in records]
        ids = iter(self._encoder.ids([piece for of_record in pieces for piece in of_record]))
        return [self._joined([next(ids) for _ in of_record], longest) for of_record in pieces]

    def spells_markup(self, text: str) -> bool:
        return self._encoder.spells_markup(text)

    def _pieces(self, record: LabelledRecord) -> list[Piece]:
        text = PAIR_SEPARATOR.join(record.texts)
        framed = ((self._encoder.prefix, True), (text, False), (self._encoder.end, True))
        return [Piece(part, is_markup, False) for part, is_markup in framed]

    def _joined(self, parts: Sequence[Sequence[int]], longest: int) -> Encoded:
        prefix, text, end = parts
        room = max(1, longest - len(prefix) - len(end))
        return Encoded([*prefix, *text[:room], *end], None, len(prefix) + len(text) + len(end))


@dataclass(frozen=True, slots=True)
class RowShape:
    """How long a row may be."""

    longest: int  # tokens
    truncate: bool  # cut a longer one instead of refusing it


def labelled_rows(
    records: Sequence[LabelledRecord],
    encoder: SequenceEncoder,
    task: LabelledTask,
    shape: RowShape,
    problems: Problems,
) -> tuple[list[Row], int]:
    """A row per record, and how many were cut. What is wrong with a record goes to `problems`."""
    rows: list[Row] = []
    cut = 0
    for record, encoded in _encoded_records(records, encoder, shape.longest):
        try:
            check_length(encoded.length, shape, shortest=len(encoded.ids))
            rows.append(_row(encoded, label_value(record, task)))
            cut += encoded.length > len(encoded.ids)
        except Problem as problem:
            problems.add(problem, line=record.line)
    return rows, cut


def _encoded_records(
    records: Sequence[LabelledRecord], encoder: SequenceEncoder, longest: int
) -> Iterator[tuple[LabelledRecord, Encoded]]:
    for start in range(0, len(records), _BATCH_RECORDS):
        batch = records[start : start + _BATCH_RECORDS]
        yield from zip(batch, encoder.encode(batch, longest=longest), strict=True)


def check_length(length: int, shape: RowShape, *, shortest: int = 1, of: str = "row") -> None:
    """Raises Problem `ROW_TOO_LONG` for a row that may not be cut, or not below `shortest`."""
    if length > shape.longest and (not shape.truncate or shortest > shape.longest):
        limit, actual = f"{shape.longest} tokens", f"{length} tokens"
        raise Problem("ROW_TOO_LONG", f"the {of} has {actual}, {limit} fit", limit=limit, actual=actual)


def _row(encoded: Encoded, label: int | float) -> Row:
    return Row(
        tokens=np.array(encoded.ids, np.int32),
        weights=_NO_WEIGHTS,
        label=label,
        token_types=None if encoded.types is None else np.array(encoded.types, np.int8),
    )


def _encoded(encoding: Any, length: int) -> Encoded:
    ids, types = encoding.ids, encoding.type_ids
    return Encoded(ids, types if any(types) else None, length)
