"""Held-out prompts to generate from, and what should come, for metrics that judge generated text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cola_runtime.data.formats import Dataset, DatasetFormat
from cola_runtime.data.records import ChatRecord, CompletionRecord, Message, Record
from cola_runtime.data.tokenize import TokenizedDataset, Tokenizer
from cola_runtime.data.violations import Problem, Problems
from cola_runtime.errors import InvalidInput
from cola_runtime.rows import Row

MAX_PROMPTS = 1024  # an evaluation answers every one of them

_REMEDY = "Change the held-out rows, max_new_tokens or the metric; nothing was created."


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutPrompts:
    """What is generated from at every evaluation, and what it is compared with."""

    prompts: tuple[tuple[int, ...], ...]  # tokens to continue; of an encoder-decoder its sources
    references: tuple[str, ...]  # of each prompt the completion, or the last assistant turn
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    decode: Callable[[Sequence[int]], str]

    def answers(self, generated: Sequence[Sequence[int]]) -> list[tuple[str, str]]:
        """Of every prompt the reference and the text of what was generated."""
        return list(zip(self.references, map(self.decode, generated), strict=True))


def held_out_prompts(
    dataset: Dataset, rows: TokenizedDataset, tokenizer: Tokenizer, *, context_length: int, new_tokens: int
) -> HeldOutPrompts:
    """A prompt per record. Raises InvalidInput with the first 20 wrong rows: `PROMPT_TOO_LONG` where no
    `new_tokens` fit behind it, `ROW_NOT_RENDERED`; or `METRIC_UNSUPPORTED`, `TOO_MANY_PROMPTS`.
    """
    _check(dataset)
    problems = Problems(dataset.file_name, remedy=_REMEDY)
    prompts: list[tuple[int, ...]] = []
    for record, row in zip(dataset.records, rows.rows, strict=True):
        try:
            prompts.append(tuple(_prompt(record, row, tokenizer)))
            _check_room(prompts[-1], row, context_length, new_tokens)
        except InvalidInput as error:
            problems.add(Problem(error.reason, error.message), line=record.line)
        except Problem as problem:
            problems.add(problem, line=record.line)
    problems.raise_if_any()
    return HeldOutPrompts(
        prompts=tuple(prompts),
        references=tuple(map(_reference, dataset.records)),
        max_new_tokens=new_tokens,
        stop_ids=tokenizer.stop_ids,
        decode=tokenizer.decode,
    )


def _check(dataset: Dataset) -> None:
    if dataset.format not in (DatasetFormat.CHAT, DatasetFormat.PROMPT_COMPLETION):
        raise InvalidInput(
            "METRIC_UNSUPPORTED",
            f"rouge_l answers prompts, and {dataset.format} records have none",
            where=dataset.file_name,
            remedy="Give held-out rows of prompt and completion, or messages; nothing was created.",
        )
    if len(dataset.records) > MAX_PROMPTS:
        raise InvalidInput(
            "TOO_MANY_PROMPTS",
            "every held-out prompt is answered at each evaluation",
            where=dataset.file_name,
            limit=MAX_PROMPTS,
            actual=len(dataset.records),
            remedy="Give fewer held-out rows, or another metric; nothing was created.",
        )


def _prompt(record: Record, row: Row, tokenizer: Tokenizer) -> Sequence[int]:
    if row.source is not None:
        return [int(token) for token in row.source]  # cut as for training, where the job allows that
    if isinstance(record, CompletionRecord):
        return tokenizer.encode_prompt(record.prompt)
    return tokenizer.encode_prompt(_messages(record)[: _last_answer(record)])


def _check_room(prompt: Sequence[int], row: Row, context_length: int, new_tokens: int) -> None:
    given = 1 if row.source is not None else len(prompt)  # a decoder behind an encoder has its start only
    if given + new_tokens > context_length:
        message = f"{given} tokens and {new_tokens} new ones do not fit the context of {context_length}"
        raise Problem("PROMPT_TOO_LONG", message, limit=context_length, actual=given + new_tokens)


def _reference(record: Record) -> str:
    if isinstance(record, CompletionRecord):
        return record.completion
    return _messages(record)[_last_answer(record)].content


def _messages(record: Record) -> tuple[Message, ...]:
    assert isinstance(record, ChatRecord)  # `_check` has looked
    return record.messages


def _last_answer(record: Record) -> int:
    roles = [message.role for message in _messages(record)]
    return max(place for place, role in enumerate(roles) if role == "assistant")
