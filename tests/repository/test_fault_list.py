"""docs/faults.md leaves no case out, and names no test that there is not."""

from __future__ import annotations

import re
from pathlib import Path

CASES = {f"F{number}" for number in range(1, 65)} | {f"U{number}" for number in range(1, 9)}


def test_every_case_has_a_row_and_every_named_test_exists(repository: Path) -> None:
    text = (repository / "docs/faults.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([FU]\d+) [^|]+\|[^|]*\|([^|]+)\|$", text, flags=re.MULTILINE)
    assert sorted(case for case, _ in rows) == sorted(CASES)
    assert all(shown.strip() for _, shown in rows)
    sources = [path.read_text(encoding="utf-8") for path in (repository / "tests").rglob("test_*.py")]
    there = set(re.findall(r"def (test_\w+)", "\n".join(sources)))
    assert set(re.findall(r"`(test_\w+)`", text)) <= there
    assert all((repository / path).exists() for path in re.findall(r"`(tests/[\w/.]+)`", text))
