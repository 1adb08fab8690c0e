"""Runs tests against private copies of the package, changed or not, each in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tests.traps.change import Change

TIMEOUT_SECONDS = 300
# What a test that judged says. Anything else, a collection error or a broken shape, judged nothing.
_ASSERTED = ("AssertionError", "assert ", "Failed: DID NOT RAISE", "Failed: DID NOT WARN")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of the tests of one copy."""

    passed: int
    asserted: tuple[str, ...]  # tests that failed by an assertion
    broken: tuple[str, ...]  # tests that failed otherwise, or could not begin
    output: str


def named_tests(repository: Path) -> dict[int, list[str]]:
    """Trap -> the tests that docs/traps.md names for it."""
    page = (repository / "docs/traps.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|.*\|(.*)\|$", page, flags=re.MULTILINE)
    return {int(trap): re.findall(r"`(tests/[\w/]+\.py::\w+)`", tests) for trap, tests in rows}


def private_copy(repository: Path, folder: Path) -> Path:
    """`folder` with the package, its tests and pytest's settings, and nothing compiled."""
    for name in ("cola_runtime", "tests"):
        shutil.copytree(repository / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(repository / "pyproject.toml", folder)
    return folder


def put_back(change: Change, copy: Path) -> None:
    file = copy / change.file
    file.write_text(change.applied(file.read_text(encoding="utf-8")), encoding="utf-8")


def run_tests(copy: Path, tests: Sequence[str]) -> Outcome:
    """Run `tests` in `copy`, the only place that cola_runtime can come from, until the first one fails."""
    report = copy / "report.xml"
    # The copy's own Python path, and no cache of compiled files that a change could hide behind.
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", *tests, "-q", "-p", "no:cacheprovider"]
    finished = subprocess.run(
        [*command, "-x", f"--junitxml={report}"],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    output = finished.stdout + finished.stderr
    assert report.is_file(), output
    return outcome_of(report.read_text(encoding="utf-8"), output)


def outcome_of(report: str, output: str = "") -> Outcome:
    """Read pytest's JUnit report."""
    passed = 0
    asserted: list[str] = []
    broken: list[str] = []
    for case in ElementTree.fromstring(report).iter("testcase"):
        failure = case.find("failure")
        if failure is not None and failure.get("message", "").startswith(_ASSERTED):
            asserted.append(_name(case))
        elif failure is not None or case.find("error") is not None:
            broken.append(_name(case))
        elif case.find("skipped") is None:
            passed += 1
    return Outcome(passed=passed, asserted=tuple(asserted), broken=tuple(broken), output=output)


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
