"""Prints the matrix when the whole of it ran, and leaves it under benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.matrix.cells import Cell, is_quick

Results = dict[str, dict[Cell, float | str]]  # what was compared -> cell -> worst error, or why it is empty
HERE = Path(__file__).parent
RESULTS = pytest.StashKey[Results]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--matrix"):
        return
    left_out = [item for item in items if item.path.parent == HERE and not is_quick(item.callspec.params)]
    config.hook.pytest_deselected(items=left_out)
    kept = set(items) - set(left_out)
    items[:] = [item for item in items if item in kept]


@pytest.fixture
def results(request: pytest.FixtureRequest) -> Results:
    return request.config.stash[RESULTS]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    if not config.getoption("--matrix") or not results:
        return
    for compared, found in results.items():
        terminalreporter.section(f"{compared}: worst relative difference")
        kinds = list(dict.fromkeys(cell.kind for cell in found))
        terminalreporter.write_line(f"{'':64}" + "".join(f"{kind:>18}" for kind in kinds))
        rows: dict[tuple[str, ...], dict[str, float | str]] = {}
        for cell, value in found.items():
            rows.setdefault((cell.architecture, cell.task, cell.mode, cell.encoding), {})[cell.kind] = value
        for place, values in sorted(rows.items()):
            name = "{:10} {:24} {:9} {}".format(*place)
            shown = (values[kind] for kind in kinds)
            texts = (f"{value:.1e}" if isinstance(value, float) else "-" for value in shown)
            terminalreporter.write_line(f"{name:64}" + "".join(f"{text:>18}" for text in texts))
    reasons = {value for found in results.values() for value in found.values() if isinstance(value, str)}
    for reason in sorted(reasons):
        terminalreporter.write_line(f"-  {reason}")
    _save(results)


def _save(results: Results) -> None:
    folder = Path("benchmarks/results")
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        compared: [{**_fields(cell), "result": value} for cell, value in sorted(found.items())]
        for compared, found in results.items()
    }
    (folder / "matrix.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _fields(cell: Cell) -> dict[str, str]:
    names = ("architecture", "task", "mode", "encoding", "kind")
    return {name: getattr(cell, name) for name in names}
