"""What commands print: tables for people, JSON for programs. Nothing of it can steer the terminal."""

from __future__ import annotations

import dataclasses
import json
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

STATE_STYLES = {
    "queued": "yellow",
    "running": "cyan",
    "paused": "magenta",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "dim",
}
PIPE_COLUMNS = 1000
_UNSAFE_CATEGORIES = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})


def clean(value: object) -> str:
    """The text without control characters, escapes and direction overrides; line breaks become blanks."""
    text = str(value).replace("\n", " ").replace("\t", " ")
    return "".join(c for c in text if unicodedata.category(c) not in _UNSAFE_CATEGORIES)


def clean_block(value: object) -> str:
    """`clean`, line by line."""
    return "\n".join(clean(line) for line in str(value).splitlines())


def stdout() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _wide() -> Console:
    """For tables: as wide as the terminal; into a pipe, wide enough that lines stay whole."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPE_COLUMNS)
    return console


def print_text(*parts: str | tuple[str, str]) -> None:
    """One line. A part is plain text or (text, style); markup in it means nothing."""
    stdout().print(Text.assemble(*parts))


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    sys.stdout.write(json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def print_json_line(value: Any) -> None:
    sys.stdout.write(json.dumps(plain(value), allow_nan=False) + "\n")
    sys.stdout.flush()


def plain(value: Any) -> Any:
    """Dataclasses as mappings, a job's spec as an object rather than as text in text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(fields.get("spec_json"), str):
            fields["spec"] = json.loads(fields.pop("spec_json"))
        return fields
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def table(columns: Sequence[str], rows: Iterable[Sequence[object | Text]]) -> Table:
    """Columns whose name starts with `>` are aligned right."""
    found = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        right = name.startswith(">")
        found.add_column(name.lstrip(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        found.add_row(*(cell if isinstance(cell, Text) else Text(clean(cell)) for cell in row))
    return found


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object | Text]], *, empty: str) -> None:
    if rows:
        _wide().print(table(columns, rows))
    else:
        print_text((empty, "dim"))


def print_fields(fields: Mapping[str, object | Text]) -> None:
    """Name and value, one pair a line; empty values are left out."""
    grid = Table.grid(padding=(0, 2))
    for name, value in fields.items():
        if value not in ("", None):
            grid.add_row(
                Text(name, style="bold"), value if isinstance(value, Text) else Text(clean_block(value))
            )
    _wide().print(grid)


def state_text(state: str) -> Text:
    return Text(clean(state), style=STATE_STYLES.get(state, ""))


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def byte_size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def age(moment: str, *, now: datetime | None = None) -> str:
    """`3m ago`, from an RFC 3339 time."""
    if not moment:
        return "-"
    seconds = ((now or datetime.now(UTC)) - datetime.fromisoformat(moment)).total_seconds()
    for limit, unit_seconds, unit in ((60, 1, "s"), (3600, 60, "m"), (86400, 3600, "h")):
        if seconds < limit:
            return f"{max(seconds, 0) // unit_seconds:.0f}{unit} ago"
    return f"{seconds // 86400:.0f}d ago"
