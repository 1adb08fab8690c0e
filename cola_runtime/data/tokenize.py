"""Records to token rows with label weights, and prompts to tokens, by a base model's own tokenizer.

A row is encoded piece by piece: a template's markup, and each text by itself, in which nothing is a special
token. So an answer begins exactly where a generation would begin.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cola_runtime.data.encoder import Encoder
from cola_runtime.data.formats import Dataset
from cola_runtime.data.records import ChatRecord, CompletionRecord, Message, Record
from cola_runtime.data.template import Piece
from cola_runtime.data.violations import Problem, Problems
from cola_runtime.errors import InvalidInput
from cola_runtime.spec import JobSpec
from cola_runtime.types import Row

BATCH_RECORDS = 512  # encoded at a time; bounds the memory that the encoder's own results take

_REMEDY = "Shorten or correct these rows, or change max_length or truncate; nothing was created."


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedDataset:
    """A dataset's rows, in the order of its records."""

    rows: tuple[Row, ...]
    truncated_rows: int  # cut at the longest length
    literal_markup_rows: int  # whose text spells a special token; it was encoded as text


@dataclass(slots=True)
class _Draft:
    """A row while it grows: its tokens, and which spans of them are answers."""

    tokens: list[int] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)

    def add(self, ids: Sequence[int], *, labels: int) -> None:
        """Append tokens, the first `labels` of which are to be learnt."""
        self.answers.append((len(self.tokens), len(self.tokens) + labels))
        self.tokens.extend(ids)

    def row(self, *, max_length: int, loss: str) -> Row:
        tokens = np.array(self.tokens[:max_length], np.int32)
        weights = np.full(len(tokens), 1.0 if loss == "full" else 0.0, np.float32)
        for start, stop in self.answers:
            weights[start:stop] = 1
        weights[:1] = 0  # nothing predicts the first token
        return Row(tokens=tokens, weights=weights)


class Tokenizer:
    """The tokenizer and chat template of the base model in a folder. Safe to use from several threads."""

    def __init__(self, path: Path | str) -> None:
        """Raises InvalidInput `TOKENIZER_UNSUPPORTED`."""
        self._encoder = Encoder(Path(path))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation: end of text, end of turn, and what the model's settings name."""
        return self._encoder.stop_ids

    def tokenize(
        self, dataset: Dataset, *, max_length: int, loss: str = "completion", truncate: bool = False
    ) -> TokenizedDataset:
        """One row per record. Labels are the answers and their ends (`completion`), or all tokens (`full`).

        Of prompt and completion the completion is the answer, of plain text all of it. Raises InvalidInput
        with the first 20 wrong rows and the number of all: ROW_TOO_LONG, ROW_WITHOUT_LABELS,
        ROW_NOT_RENDERED; or TEMPLATE_MISSING.
        """
        problems = Problems(dataset.file_name, remedy=_REMEDY)
        rows: list[Row] = []
        truncated = 0
        for record, draft in self._drafts(dataset, problems):
            try:
                _check_length(draft, max_length, truncate=truncate)
                rows.append(_labelled(draft.row(max_length=max_length, loss=loss)))
                truncated += len(draft.tokens) > max_length
            except Problem as problem:
                problems.add(problem, line=record.line)
        problems.raise_if_any()
        literal = sum(self._spells_markup(record) for record in dataset.records)
        return TokenizedDataset(rows=tuple(rows), truncated_rows=truncated, literal_markup_rows=literal)

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """What to continue: plain text, or messages followed by the head of an answer.

        Raises InvalidInput `TEMPLATE_MISSING`, `ROW_NOT_RENDERED`.
        """
        if isinstance(prompt, str):
            pieces = [Piece(self._encoder.prefix, True, False), Piece(prompt, False, False)]
        else:
            pieces = self._answer_pieces(prompt)
        return [token for ids in self._encoder.ids(pieces) for token in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special tokens left out."""
        return self._encoder.decode(ids)

    def _drafts(self, dataset: Dataset, problems: Problems) -> Iterator[tuple[Record, _Draft]]:
        """Each record that can be rendered, encoded; the others become problems."""
        for start in range(0, len(dataset.records), BATCH_RECORDS):
            batch: list[tuple[Record, list[Piece]]] = []
            for record in dataset.records[start : start + BATCH_RECORDS]:
                try:
                    batch.append((record, self._pieces(record)))
                except Problem as problem:
                    problems.add(problem, line=record.line)
            encoded = iter(self._encoder.ids([piece for _, pieces in batch for piece in pieces]))
            for record, pieces in batch:
                yield record, self._draft(pieces, encoded)

    def _draft(self, pieces: Sequence[Piece], encoded: Iterator[Sequence[int]]) -> _Draft:
        draft = _Draft()
        for piece in pieces:
            ids = next(encoded)
            draft.add(ids, labels=self._encoder.labels(piece, ids))
        return draft

    def _pieces(self, record: Record) -> list[Piece]:
        prefix, end = Piece(self._encoder.prefix, True, False), Piece(self._encoder.end, True, True)
        if isinstance(record, ChatRecord):
            pieces = self._encoder.chat_template().pieces(record.messages)
            return pieces if self._encoder.turn_end_id is not None else [*pieces, end]
        if isinstance(record, CompletionRecord):
            return [prefix, Piece(record.prompt, False, False), Piece(record.completion, False, True), end]
        return [prefix, Piece(record.text, False, True), end]

    def _answer_pieces(self, messages: Sequence[Message]) -> list[Piece]:
        try:
            return self._encoder.chat_template().pieces(messages, answer=True)
        except Problem as problem:
            raise InvalidInput(problem.reason, problem.message, where="messages") from problem

    def _spells_markup(self, record: Record) -> bool:
        return any(map(self._encoder.spells_markup, _texts(record)))


def longest_row(spec: JobSpec, *, context_length: int) -> int:
    """Tokens that a row of this job may have. Raises InvalidInput `MAX_LENGTH_ABOVE_CONTEXT`."""
    if spec.max_length is not None and spec.max_length > context_length:
        raise InvalidInput(
            "MAX_LENGTH_ABOVE_CONTEXT",
            f"max_length is more than the context of {spec.base_model}",
            where="job.max_length",
            limit=context_length,
            actual=spec.max_length,
            remedy="Lower max_length or leave it out.",
        )
    return spec.max_length or context_length


def _check_length(draft: _Draft, max_length: int, *, truncate: bool) -> None:
    length = len(draft.tokens)
    if length > max_length and not truncate:
        limit, actual = f"{max_length} tokens", f"{length} tokens"
        raise Problem("ROW_TOO_LONG", f"the row has {actual}, {limit} fit", limit=limit, actual=actual)


def _labelled(row: Row) -> Row:
    if row.label_tokens == 0:
        raise Problem("ROW_WITHOUT_LABELS", f"none of the row's {len(row.tokens)} tokens is a label")
    return row


def _texts(record: Record) -> list[str]:
    if isinstance(record, ChatRecord):
        return [message.content for message in record.messages]
    if isinstance(record, CompletionRecord):
        return [record.prompt, record.completion]
    return [record.text]
