"""One line of bytes to one JSON value, strictly: RFC 8259, no duplicate keys, with the column of an error."""

from __future__ import annotations

import json
from typing import Any

from cola_runtime.data.violations import Problem


class _RefusedToken(ValueError):
    """Text that Python's parser would let pass; `token` is what to look for in the line."""

    def __init__(self, message: str, token: str) -> None:
        super().__init__(message)
        self.token = token


def parse_line(line: bytes) -> Any:
    """The line's value. Raises Problem `DATASET_UTF8` or `DATASET_JSON`."""
    text = _decode(line)
    try:
        return _decoder.decode(text)
    except json.JSONDecodeError as error:
        raise _invalid(error.msg.replace(" starting at", ""), column=error.colno) from error
    except _RefusedToken as error:
        raise _invalid(str(error), column=text.rfind(error.token) + 1) from error
    except RecursionError as error:
        raise _invalid("nested too deep") from error
    except ValueError as error:
        raise _invalid("a number has too many digits") from error


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode("utf-8")) + 1
        message = f"byte {line[error.start]:#04x} at offset {error.start} of the line is not UTF-8"
        raise Problem("DATASET_UTF8", message, column=column) from error


def _invalid(message: str, *, column: int = 1) -> Problem:
    return Problem("DATASET_JSON", f"invalid JSON: {message}", column=column)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise _RefusedToken(f"key {repeated!r} occurs twice in one object", json.dumps(repeated))
    return found


def _no_constant(token: str) -> None:
    raise _RefusedToken(f"{token} is not JSON", token)


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
