"""JSONL bytes to records, or an error that names every place to correct.

One object per line, all of one format:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}
    {"text": "..."}
    {"text": "...", "label": "name" or a number}, maybe with a "text_pair": "..."
    {"image": "<PNG or JPEG in base64>", "label": "name" or a number}

A byte-order mark, CRLF, blank lines and a missing final newline are accepted. Blank lines count as lines.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from cola_runtime.data.json_lines import parse_line
from cola_runtime.data.records import (
    ChatRecord,
    CompletionRecord,
    ImageRecord,
    LabelledRecord,
    Record,
    TextRecord,
    read_record,
)
from cola_runtime.data.violations import Problem, Problems
from cola_runtime.errors import InvalidInput

MAX_DATASET_BYTES = 512 * 2**20
MAX_LINE_BYTES = 4 * 2**20
MAX_ROWS = 1_000_000

_REMEDY = "Correct the file and try again; nothing was created."
_UTF8_MARK = b"\xef\xbb\xbf"
_FOREIGN_MARKS = {  # first bytes of files that are mistaken for JSON lines
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "a zip archive",
    b"\x1f\x8b": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ\x00": "an xz file",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
_TAR_MARK = (257, b"ustar")


class DatasetFormat(enum.StrEnum):
    """What each line of a dataset holds; the value is the word in reports."""

    CHAT = "chat"
    PROMPT_COMPLETION = "prompt_completion"
    TEXT = "text"
    LABELLED = "labelled"
    LABELLED_IMAGE = "labelled_image"


_FORMATS: dict[type, DatasetFormat] = {
    ChatRecord: DatasetFormat.CHAT,
    CompletionRecord: DatasetFormat.PROMPT_COMPLETION,
    TextRecord: DatasetFormat.TEXT,
    LabelledRecord: DatasetFormat.LABELLED,
    ImageRecord: DatasetFormat.LABELLED_IMAGE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A file's records in its order, all of one format; there is at least one."""

    file_name: str  # the tenant's, for messages
    format: DatasetFormat
    records: tuple[Record, ...]


def parse_dataset(content: bytes, *, file_name: str) -> Dataset:
    """Check every line. Raises InvalidInput with the first 20 wrong lines as violations, and their number.

    Its reason is the first one's: DATASET_TOO_LARGE, _FORMAT, _EMPTY, _LINE_TOO_LONG, _UTF8, _JSON, _RECORD
    or _TOO_MANY_ROWS; `where` is `file:line:column`.
    """
    _check_size(content, file_name)
    _check_foreign(content, file_name)
    problems = Problems(file_name, remedy=_REMEDY)
    records: list[Record] = []
    for number, line in _lines(content):
        try:
            records.append(_record(line, number, like=records[0] if records else None))
        except Problem as problem:
            problems.add(problem, line=number)
        if len(records) > MAX_ROWS:
            raise _refused("DATASET_TOO_MANY_ROWS", "too many rows", file_name, limit=MAX_ROWS)
    problems.raise_if_any()
    if not records:
        raise _refused("DATASET_EMPTY", "there is no record in the file", file_name)
    return Dataset(file_name=file_name, format=_FORMATS[type(records[0])], records=tuple(records))


def _check_size(content: bytes, file_name: str) -> None:
    if len(content) > MAX_DATASET_BYTES:
        limit, actual = (f"{number} bytes" for number in (MAX_DATASET_BYTES, len(content)))
        raise _refused("DATASET_TOO_LARGE", "the file is too large", file_name, limit=limit, actual=actual)


def _check_foreign(content: bytes, file_name: str) -> None:
    kinds = [kind for mark, kind in _FOREIGN_MARKS.items() if content.startswith(mark)]
    if content.startswith(_TAR_MARK[1], _TAR_MARK[0]):
        kinds.append("a tar archive")
    if content[:1024].removeprefix(_UTF8_MARK).lstrip().startswith(b"["):
        kinds.append("one JSON array")
    if kinds:
        raise _refused("DATASET_FORMAT", f"this is {kinds[0]}, not JSON lines in UTF-8", file_name)


def _refused(
    reason: str, message: str, file_name: str, *, limit: object = None, actual: object = None
) -> InvalidInput:
    return InvalidInput(reason, message, where=file_name, limit=limit, actual=actual, remedy=_REMEDY)


def _lines(content: bytes) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of every line that is not blank, the line end left out; nothing is copied."""
    view = memoryview(content)
    start = len(_UTF8_MARK) if content.startswith(_UTF8_MARK) else 0
    number = 0
    while start < len(content):
        number += 1
        end = content.find(b"\n", start)
        end = len(content) if end < 0 else end
        last = end - 1 if end > start and content[end - 1] == ord("\r") else end
        line = view[start:last]
        if not _is_blank(line):
            yield number, line
        start = end + 1


def _is_blank(line: memoryview) -> bool:
    return not bytes(line[:64]).strip() and not bytes(line).strip()


def _record(line: memoryview, number: int, *, like: Record | None) -> Record:
    if len(line) > MAX_LINE_BYTES:
        message = "the line is too long"
        limit, actual = (f"{size} bytes" for size in (MAX_LINE_BYTES, len(line)))
        raise Problem("DATASET_LINE_TOO_LONG", message, limit=limit, actual=actual)
    record = read_record(parse_line(bytes(line)), line=number)
    if like is not None and type(record) is not type(like):
        found, first = _FORMATS[type(record)], _FORMATS[type(like)]
        raise Problem("DATASET_RECORD", f"a {found} record, but line {like.line} is a {first} record")
    return record
