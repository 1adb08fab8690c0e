"""Records to token rows with label weights, and prompts to tokens, by a base model's own tokenizer.

A row is encoded piece by piece: a template's markup, and each text by itself, in which nothing is a special
token. So an answer begins exactly where a generation would begin.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cola_runtime.data.encoder import Encoder
from cola_runtime.data.formats import Dataset, DatasetFormat
from cola_runtime.data.images import ImageReader
from cola_runtime.data.records import (
    ChatRecord,
    CompletionRecord,
    ImageRecord,
    LabelledRecord,
    Message,
    Record,
    TextRecord,
)
from cola_runtime.data.sequences import (
    FramedSequences,
    PlainSequences,
    RowShape,
    SequenceEncoder,
    check_length,
    labelled_rows,
)
from cola_runtime.data.source_target import SourceTargetEncoder
from cola_runtime.data.template import Piece
from cola_runtime.data.violations import Problem, Problems
from cola_runtime.errors import InvalidInput
from cola_runtime.rows import Row
from cola_runtime.spec import JobSpec
from cola_runtime.task_spec import (
    AnyTask,
    CausalLmTask,
    ImageClassificationTask,
    SequenceToSequenceTask,
)
from cola_runtime.types import BaseModelDescription

BATCH_RECORDS = 512  # encoded at a time; bounds the memory that the encoder's own results take

_CAUSAL = CausalLmTask()
_FORMATS: dict[type, tuple[DatasetFormat, ...]] = {
    CausalLmTask: (DatasetFormat.CHAT, DatasetFormat.PROMPT_COMPLETION, DatasetFormat.TEXT),
    ImageClassificationTask: (DatasetFormat.LABELLED_IMAGE,),
    SequenceToSequenceTask: (DatasetFormat.PROMPT_COMPLETION,),
}
"""What a task's records may be; any other task's are labelled."""
_FORMAT_REMEDIES = {
    _FORMATS[CausalLmTask]: "Name the job's task: sequence_classification or regression.",
    _FORMATS[
        ImageClassificationTask
    ]: 'Write every record as {"image": ..., "label": ...}, the image in base64.',
    _FORMATS[SequenceToSequenceTask]: 'Write every record as {"prompt": ..., "completion": ...}: '
    "the encoder reads the prompt, and a text or a conversation has none.",
    (DatasetFormat.LABELLED,): 'Label every record, {"text": ..., "label": ...}, or name another task.',
}
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


_MAKING = threading.Lock()
_KEPT_TOKENIZERS = 4  # to read a vocabulary of 49,152 words takes a second or two of CPU


class Tokenizer:
    """The tokenizer and chat template of the base model in a folder. Safe to use from several threads."""

    def __init__(
        self,
        path: Path | str,
        *,
        bidirectional: bool = False,
        encoder_decoder: bool = False,
        image_tokens: int | None = None,
    ) -> None:
        """`bidirectional`: the base model is an encoder, or with `image_tokens` it reads images, not texts.

        Raises InvalidInput `TOKENIZER_UNSUPPORTED`, `IMAGE_PROCESSOR_UNSUPPORTED`.
        """
        self._images = None if image_tokens is None else ImageReader(Path(path), tokens=image_tokens)
        self._pairs = SourceTargetEncoder(Path(path)) if encoder_decoder else None
        self._causal = None if bidirectional or encoder_decoder else Encoder(Path(path))
        self._sequences: SequenceEncoder | None = None
        if self._causal is not None:
            self._sequences = PlainSequences(self._causal)
        elif self._images is None and self._pairs is None:
            self._sequences = FramedSequences(Path(path))

    @classmethod
    def of(cls, base: BaseModelDescription) -> Tokenizer:
        """The base model's own, made once in a process. Raises InvalidInput as when it is made."""
        with _MAKING:  # a second job that starts meanwhile waits for the first one's
            return _made(
                base.tokenizer_path,
                bidirectional=base.bidirectional,
                encoder_decoder=base.encoder_decoder,
                image_tokens=base.context_length if base.takes_images else None,
            )

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation: end of text, end of turn, and what the model's settings name."""
        return self._encoder.stop_ids if self._pairs is None else self._pairs.stop_ids

    def tokenize(
        self,
        dataset: Dataset,
        *,
        max_length: int,
        loss: str = "completion",
        truncate: bool = False,
        task: AnyTask = _CAUSAL,
    ) -> TokenizedDataset:
        """One row per record. Labels are the answers and their ends (`completion`), or all tokens (`full`).

        Of prompt and completion the completion is the answer, of plain text all of it; an encoder-decoder
        reads the prompt as its source; another task's rows are labelled as a whole. Raises InvalidInput with
        the first 20 wrong rows and the number of all: ROW_TOO_LONG, ROW_WITHOUT_LABELS, ROW_NOT_RENDERED,
        LABEL_INVALID, _UNKNOWN, _OUT_OF_RANGE, IMAGE_FORMAT, _TOO_LARGE, _BROKEN; or TASK_FORMAT,
        TEMPLATE_MISSING.
        """
        _check_format(dataset, task)
        problems = Problems(dataset.file_name, remedy=_REMEDY)
        shape = RowShape(max_length, truncate)
        if isinstance(task, CausalLmTask):
            rows, truncated = self._causal_rows(dataset, shape, loss, problems)
        elif isinstance(task, SequenceToSequenceTask):
            assert self._pairs is not None  # admission lets the task to encoder-decoders only
            pairs = [record for record in dataset.records if isinstance(record, CompletionRecord)]
            rows, truncated = self._pairs.rows(pairs, shape, problems)
        elif isinstance(task, ImageClassificationTask):
            assert self._images is not None  # admission lets the task to image classifiers only
            images = [record for record in dataset.records if isinstance(record, ImageRecord)]
            rows, truncated = self._images.rows(images, task, problems), 0
        else:
            assert self._sequences is not None
            records = [record for record in dataset.records if isinstance(record, LabelledRecord)]
            rows, truncated = labelled_rows(records, self._sequences, task, shape, problems)
        problems.raise_if_any()
        literal = sum(self._spells_markup(record) for record in dataset.records)
        return TokenizedDataset(rows=tuple(rows), truncated_rows=truncated, literal_markup_rows=literal)

    def _causal_rows(
        self, dataset: Dataset, shape: RowShape, loss: str, problems: Problems
    ) -> tuple[list[Row], int]:
        rows: list[Row] = []
        truncated = 0
        for record, draft in self._drafts(dataset, problems):
            try:
                check_length(len(draft.tokens), shape)
                rows.append(_labelled(draft.row(max_length=shape.longest, loss=loss)))
                truncated += len(draft.tokens) > shape.longest
            except Problem as problem:
                problems.add(problem, line=record.line)
        return rows, truncated

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """What to continue: plain text, or messages followed by the head of an answer; or a source.

        Raises InvalidInput `TEMPLATE_MISSING`, `ROW_NOT_RENDERED`.
        """
        if self._pairs is not None:
            if not isinstance(prompt, str):
                raise _no_messages()
            return self._pairs.source(prompt)
        if isinstance(prompt, str):
            pieces = [Piece(self._encoder.prefix, True, False), Piece(prompt, False, False)]
        else:
            pieces = self._answer_pieces(prompt)
        return [token for ids in self._encoder.ids(pieces) for token in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special tokens left out."""
        return (self._pairs or self._encoder).decode(ids)

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
        assert isinstance(record, TextRecord)  # `_check_format` has looked
        return [prefix, Piece(record.text, False, True), end]

    def _answer_pieces(self, messages: Sequence[Message]) -> list[Piece]:
        try:
            return self._encoder.chat_template().pieces(messages, answer=True)
        except Problem as problem:
            raise InvalidInput(problem.reason, problem.message, where="messages") from problem

    def _spells_markup(self, record: Record) -> bool:
        spells = self._pairs or self._sequences
        return spells is not None and any(map(spells.spells_markup, _texts(record)))

    @property
    def _encoder(self) -> Encoder:
        if self._causal is None:
            raise InvalidInput(
                "TASK_UNSUPPORTED",
                "the base model predicts no tokens, so it continues no text",
                where="prompt",
                remedy="Ask a causal language model.",
            )
        return self._causal


_made = functools.lru_cache(_KEPT_TOKENIZERS)(Tokenizer)


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


def _check_format(dataset: Dataset, task: AnyTask) -> None:
    """Raises InvalidInput `TASK_FORMAT` for records that the task makes no row of."""
    taken = _FORMATS.get(type(task), (DatasetFormat.LABELLED,))
    if dataset.format not in taken:
        raise InvalidInput(
            "TASK_FORMAT",
            f"{task.kind} takes {', '.join(taken)} records, these are {dataset.format} records",
            where=dataset.file_name,
            remedy=_FORMAT_REMEDIES[taken],
        )


def _no_messages() -> InvalidInput:
    return InvalidInput(
        "TEMPLATE_MISSING",
        "an encoder-decoder reads one text and has no chat template, so it takes no messages",
        where="messages",
        remedy="Ask with a plain prompt.",
    )


def _labelled(row: Row) -> Row:
    if row.label_tokens == 0:
        raise Problem("ROW_WITHOUT_LABELS", f"none of the row's {len(row.tokens)} tokens is a label")
    return row


def _texts(record: Record) -> list[str]:
    if isinstance(record, ChatRecord):
        return [message.content for message in record.messages]
    if isinstance(record, CompletionRecord):
        return [record.prompt, record.completion]
    if isinstance(record, TextRecord):
        return [record.text]
    return list(record.texts) if isinstance(record, LabelledRecord) else []
