"""Prints what every fault cost when all of them were tried, and leaves it under benchmarks/results."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from cola_runtime.testing.record import record
from cola_runtime.testing.tiny_models import save_tiny_model
from tests.faults.judging import Accept, Faultless, Outcome, fault_job, train_faultless
from tests.faults.processes import Zygote

HERE = Path(__file__).parent
OUTCOMES = pytest.StashKey[list[Outcome]]()
STARTED = pytest.StashKey[float]()
COLUMNS = (
    "part", "case", "faults", "steps_lost", "applied_twice", "bit_identical", "recovery_seconds",
    "target_seconds", "steps_made_again", "leases",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OUTCOMES] = []
    config.stash[STARTED] = time.time()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if item.path.parent == HERE and not _wanted(item, config)]
    config.hook.pytest_deselected(items=left_out)
    kept = set(items) - set(left_out)
    items[:] = [item for item in items if item in kept]


def _wanted(item: pytest.Item, config: pytest.Config) -> bool:
    if item.get_closest_marker("many_jobs") is not None:
        return bool(config.getoption("--many-jobs"))
    return bool(config.getoption("--faults")) or item.get_closest_marker("quick") is not None


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def faultless(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Faultless:
    return asyncio.run(train_faultless(model, tmp_path_factory.mktemp("faultless"), fault_job()))


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    forking = Zygote()
    yield forking
    forking.close()


@pytest.fixture
def accept(request: pytest.FixtureRequest) -> Accept:
    """Call with each case's outcome. A plain run, on a machine of any load, does not judge the time."""

    def take(outcome: Outcome) -> None:
        request.config.stash[OUTCOMES].append(outcome)
        assert outcome.good if request.config.getoption("--faults") else outcome.kept, outcome

    return take


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    outcomes = config.stash[OUTCOMES]
    if not config.getoption("--faults") or not outcomes:
        return
    terminalreporter.section("faults: what each cost")
    rows = [[_text(outcome.fields()[column]) for column in COLUMNS] for outcome in outcomes]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for row in (list(COLUMNS), *rows):
        line = "  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True))
        terminalreporter.write_line(line)
    good = sum(outcome.good for outcome in outcomes)
    terminalreporter.write_line(f"{good} of {len(outcomes)} cases: nothing lost or twice, same bits, in time")
    _save(outcomes, datetime.fromtimestamp(config.stash[STARTED], UTC))


def _save(outcomes: list[Outcome], started: datetime) -> None:
    folder = Path("benchmarks/results")
    folder.mkdir(parents=True, exist_ok=True)
    results = {"cases": [outcome.fields() for outcome in outcomes]}
    content = record("faults", results, seed=0, started=started)
    (folder / "faults.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _text(value: object) -> str:
    return {True: "yes", False: "NO"}[value] if isinstance(value, bool) else str(value)
