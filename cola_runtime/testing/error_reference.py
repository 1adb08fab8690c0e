"""Writes docs/errors.md from the table of reasons: `python -m cola_runtime.testing.error_reference > docs/errors.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby

from cola_runtime import errors
from cola_runtime.reasons import REASONS, Reason

HEAD = """# Errors

Made of `cola_runtime/reasons.py` by `make errors`; `make check` looks that it is so.

Every error has a stable reason, a message with the values, and what to do. Over gRPC it is a status with `google.rpc.ErrorInfo` (`reason`, domain
`cola`, and as metadata the class, `where`, `limit`, `actual`, `remedy`) and for wrong input `google.rpc.BadRequest`. With `--json` a command prints it as `error`, a problem of RFC 9457:
`type` (`urn:cola:reason:` and the reason), `title` (what it means), `status` (the HTTP status below), `detail` (the message), and beside them `reason`, `where`,
`limit`, `actual`, `remedy`, `violations` and `exit_code`. An HTTP door, of which there is none yet, answers with the same.

| class | CLI exit | gRPC | HTTP | try again |
|---|---|---|---|---|
"""


def error_reference() -> str:
    return HEAD + "\n".join((*_classes(), *_areas())) + "\n"


def _classes() -> Iterator[str]:
    for kind in errors.KINDS:
        again = "yes" if kind.retryable else "no"
        yield f"| {kind.__name__} | {kind.exit_code} | {kind.grpc_code} | {kind.http_status} | {again} |"


def _areas() -> Iterator[str]:
    for area, reasons in groupby(REASONS.values(), lambda reason: reason.area):
        yield f"\n## {area}\n\n| reason | class | what it means | what to do |\n|---|---|---|---|"
        yield from map(_row, reasons)


def _row(reason: Reason) -> str:
    kinds = ", ".join(reason.kinds) or "of events and jobs"
    return f"| `{reason.name}` | {kinds} | {reason.meaning} | {reason.remedy} |"


if __name__ == "__main__":
    sys.stdout.write(error_reference())
