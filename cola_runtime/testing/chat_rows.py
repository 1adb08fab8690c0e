"""Datasets of real chats for many tenants, with rows of about so many tokens: the throughput benchmark's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path

import numpy as np

from cola_runtime.data.formats import parse_dataset
from cola_runtime.data.tokenize import Tokenizer
from cola_runtime.demo.datasets import chat_messages_by_sender
from cola_runtime.rows import Row

SPREAD = 0.25  # of a row's length around the mean
LONGEST = 4096  # tokens of a row
SAMPLED_SENDERS = 100

Length = Callable[[str], float]
"""Tokens of a text."""


def chat_datasets(
    path: Path, *, tenants: int, rows: int, tokens: int, estimate: bool, seed: int
) -> list[bytes]:
    """Of each of the senders who write most, rows of about `tokens` tokens: each some messages in a row.

    Where a sender's messages are used up, the next senders' follow. `estimate`: a row's characters tell its
    length, by a sample's tokens per character; to tokenize 96 rows of 512 at every message takes 1.4 s.
    """
    senders = sorted(chat_messages_by_sender().values(), key=lambda texts: -sum(map(len, texts)))
    length: Length = partial(_length, Tokenizer(path))
    if estimate:
        sample = " ".join(messages[0] for messages in senders[:SAMPLED_SENDERS])
        length = partial(_estimated_length, length(sample) / len(sample))
    datasets = []
    for number in range(tenants):
        lengths = _lengths(tokens, np.random.default_rng([seed, number]))
        texts = islice(joined(messages_from(senders, number), lengths, length), rows)
        datasets.append("\n".join(json.dumps({"text": text}) for text in texts).encode())
    return datasets


def messages_from(senders: Sequence[Sequence[str]], number: int) -> Iterator[str]:
    """All messages, sender after sender from this one on, and around again."""
    return cycle(chain(*senders[number:], *senders[:number]))


def joined(messages: Iterator[str], lengths: Iterator[float], length: Length) -> Iterator[str]:
    """Texts of some messages in a row, each as soon as it has its length; messages never end."""
    for wanted in lengths:
        words: list[str] = []
        for message in messages:
            words += message.split()
            text = " ".join(words)
            if length(text) >= wanted:
                yield text
                break


def tokenized(path: Path, datasets: Sequence[bytes]) -> list[tuple[Row, ...]]:
    """The rows of each."""
    tokenizer = Tokenizer(path)
    return [_rows(tokenizer, dataset) for dataset in datasets]


def _lengths(tokens: int, random: np.random.Generator) -> Iterator[float]:
    while True:
        yield tokens * random.uniform(1 - SPREAD, 1 + SPREAD)


def _length(tokenizer: Tokenizer, text: str) -> float:
    return _rows(tokenizer, json.dumps({"text": text}).encode())[0].length


def _estimated_length(tokens_per_character: float, text: str) -> float:
    return tokens_per_character * len(text)


def _rows(tokenizer: Tokenizer, dataset: bytes) -> tuple[Row, ...]:
    parsed = parse_dataset(dataset, file_name="training.jsonl")
    return tokenizer.tokenize(parsed, max_length=LONGEST).rows
