"""Prints which test caught which trap when all were put back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.traps.change import Change

Caught = dict[Change, str]  # change -> the test that caught it
CAUGHT = pytest.StashKey[Caught]()
HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CAUGHT] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--traps"):
        return
    left_out = [
        item for item in items if item.path.parent == HERE and item.get_closest_marker("traps") is not None
    ]
    config.hook.pytest_deselected(items=left_out)
    kept = set(items) - set(left_out)
    items[:] = [item for item in items if item in kept]


@pytest.fixture
def caught(request: pytest.FixtureRequest) -> Caught:
    return request.config.stash[CAUGHT]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    caught = config.stash[CAUGHT]
    if not config.getoption("--traps") or not caught:
        return
    lines = ["| trap | put back as | in | caught by |", "|---|---|---|---|"]
    for change in caught:
        file = change.file.removeprefix("cola_runtime/")
        lines.append(f"| {change.trap} | {change.form} | `{file}` | `{caught[change]}` |")
    terminalreporter.section("traps put back")
    for line in lines:
        terminalreporter.write_line(line)
    results = Path("benchmarks/results")
    results.mkdir(parents=True, exist_ok=True)
    (results / "traps.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
