"""What a tenant may give as a dataset, as named chunks of JSONL bytes."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_runtime.errors import InvalidInput

CHUNK_BYTES = 1 << 20

Dataset = str | os.PathLike[str] | bytes | Iterable[Mapping[str, Any]]
"""The path of a JSONL file, JSONL bytes, or one mapping per row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A dataset that can be read any number of times: a retried call sends it again from the start."""

    name: str  # for messages about lines
    source: Path | bytes

    async def chunks(self) -> AsyncIterator[bytes]:
        if isinstance(self.source, bytes):
            for start in range(0, len(self.source), CHUNK_BYTES):
                yield self.source[start : start + CHUNK_BYTES]
            return
        with await asyncio.to_thread(_open, self.source) as file:
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield chunk


def upload_of(dataset: Dataset, *, name: str) -> Upload:
    """`dataset` ready to send. Raises InvalidInput `DATASET_UNREADABLE` for a file that cannot be opened."""
    if isinstance(dataset, bytes):
        return Upload(name=f"{name}.jsonl", source=dataset)
    if isinstance(dataset, str | os.PathLike):
        path = Path(dataset)
        _open(path).close()
        return Upload(name=str(dataset), source=path)
    return Upload(name=f"{name} rows", source=b"".join(_lines(dataset, name)))


def _lines(rows: Iterable[Mapping[str, Any]], name: str) -> Iterable[bytes]:
    for number, row in enumerate(rows, start=1):
        try:
            yield json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise InvalidInput(
                "DATASET_ROW",
                f"the row is not JSON: {error}",
                where=f"{name} rows:{number}",
                remedy="Give rows of strings, numbers, lists and mappings. Nothing was uploaded.",
            ) from error


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise InvalidInput(
            "DATASET_UNREADABLE",
            f"cannot read the file: {error.strerror}",
            where=str(path),
            remedy="Give the path of a JSONL file. Nothing was uploaded.",
        ) from error
