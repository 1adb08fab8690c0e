"""docs/traps.md names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TRAPS = 11


def test_every_trap_names_tests_that_exist(repository: Path) -> None:
    page = (repository / "docs/traps.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|.*\|(.*)\|$", page, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, TRAPS + 1))
    for number, tests in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
        assert named, f"trap {number} names no test"
        for file, name in named:
            tree = ast.parse((repository / file).read_text(encoding="utf-8"))
            functions = (ast.FunctionDef, ast.AsyncFunctionDef)
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, functions)}, (file, name)
