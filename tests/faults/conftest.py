"""Prints what every fault cost when all of them were tried, and leaves it under benchmarks/results.

An outcome travels with its test's report, so that the table is the same whichever process ran the test.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from cola_runtime.testing.record import record
from cola_runtime.testing.tiny_models import save_tiny_model
from tests.faults.judging import Accept, Faultless, Outcome, fault_job, train_faultless
from tests.faults.processes import Zygote

HERE = Path(__file__).parent
TOGETHER = {  # what is tried one after the other in one process, by file; every other test goes where it may
    **dict.fromkeys(
        ("test_killed_actors.py", "test_ray_ports.py", "test_replicas_on_ray.py", "test_soak.py"),
        "services on Ray",  # of all Ray cases two at a time: with three at once they recover late
    ),
    "test_ray_faults.py": "Ray",
    "test_network_faults.py": "network",  # which share what is made once, as the others below
    "test_database_faults.py": "database",
    "test_crash_points.py": "crash points",
}
OUTCOME = "outcome"
OUTCOMES = pytest.StashKey[list[tuple[int, dict[str, Any]]]]()
STARTED = pytest.StashKey[float]()
COLUMNS = (
    "part", "case", "faults", "steps_lost", "applied_twice", "bit_identical", "recovery_seconds",
    "target_seconds", "steps_made_again", "leases",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OUTCOMES] = []
    config.stash[STARTED] = time.time()
    config.pluginmanager.register(Gatherer(config.stash[OUTCOMES]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    """Of several processes; what `--dist` says holds where not all faults are tried."""
    return TogetherScheduling(config, log) if config.getoption("--faults") else None


class TogetherScheduling(LoadScopeScheduling):
    """What belongs together first, in the order of its size, then single tests."""

    def _split_scope(self, nodeid: str) -> str:
        return TOGETHER.get(Path(nodeid.split("::")[0]).name, nodeid)


class Gatherer:
    """Takes the outcomes out of the reports, in the process that has the terminal."""

    def __init__(self, outcomes: list[tuple[int, dict[str, Any]]]) -> None:
        self._outcomes = outcomes

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self._outcomes.extend(tuple(value) for name, value in report.user_properties if name == OUTCOME)


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
def zygote(model: Path) -> Iterator[Zygote]:
    forking = Zygote(model)
    yield forking
    forking.close()


@pytest.fixture
def accept(request: pytest.FixtureRequest) -> Accept:
    """Call with each case's outcome. A plain run, on a machine of any load, does not judge the time."""

    place = request.session.items.index(request.node)

    def take(outcome: Outcome) -> None:
        request.node.user_properties.append((OUTCOME, (place, outcome.fields())))
        assert outcome.good if request.config.getoption("--faults") else outcome.kept, outcome

    return take


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    outcomes = [fields for _, fields in sorted(config.stash[OUTCOMES], key=itemgetter(0))]
    if not config.getoption("--faults") or not outcomes:
        return
    terminalreporter.section("faults: what each cost")
    rows = [[_text(outcome[column]) for column in COLUMNS] for outcome in outcomes]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for row in (list(COLUMNS), *rows):
        line = "  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True))
        terminalreporter.write_line(line)
    good = sum(outcome["good"] for outcome in outcomes)
    terminalreporter.write_line(f"{good} of {len(outcomes)} cases: nothing lost or twice, same bits, in time")
    _save(outcomes, datetime.fromtimestamp(config.stash[STARTED], UTC))


def _save(outcomes: list[dict[str, Any]], started: datetime) -> None:
    folder = Path("benchmarks/results")
    folder.mkdir(parents=True, exist_ok=True)
    content = record("faults", {"cases": outcomes}, seed=0, started=started)
    (folder / "faults.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _text(value: object) -> str:
    return {True: "yes", False: "NO"}[value] if isinstance(value, bool) else str(value)
