"""Each trap of the method, put back into a copy of the source, makes a test that docs/traps.md names fail.

`make traps` puts all of them back and prints the table; a plain run takes one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.traps.base_model_changes import BASE_MODEL_CHANGES
from tests.traps.change import Change
from tests.traps.conftest import Caught
from tests.traps.copies import named_tests, outcome_of, private_copy, put_back, run_tests
from tests.traps.training_changes import TRAINING_CHANGES

CHANGES = (*TRAINING_CHANGES, *BASE_MODEL_CHANGES)
QUICK = TRAINING_CHANGES[5]  # its test takes milliseconds
SLOW = 600  # seconds, for children that load torch and run services


def named_test(change: Change, repository: Path) -> list[str]:
    """The change's own test, as docs/traps.md names it for the trap."""
    return [test for test in named_tests(repository)[change.trap] if test.endswith(f"::{change.test}")]


def test_every_change_fits_the_source_and_every_trap_has_one(repository: Path) -> None:
    for change in CHANGES:
        assert len(named_test(change, repository)) == 1, change
        source = (repository / change.file).read_text(encoding="utf-8")
        changed = change.applied(source)
        assert changed != source
        compile(changed, change.file, "exec")
    assert {change.trap for change in CHANGES} == set(named_tests(repository))


def test_only_an_assertion_counts_as_caught() -> None:
    cases = {
        "judged": '<failure message="AssertionError: assert 1 == 2"/>',
        "raised_nothing": '<failure message="Failed: DID NOT RAISE any of (ColaError)"/>',
        "wrong_shape": '<failure message="RuntimeError: mat1 and mat2 shapes cannot be multiplied"/>',
        "timed_out": '<failure message="Failed: Timeout (&gt;180.0s) from pytest-timeout."/>',
        "not_imported": '<error message="collection failure"/>',
        "left_out": "<skipped/>",
        "fine": "",
    }
    written = "".join(
        f'<testcase classname="t" name="{name}">{found}</testcase>' for name, found in cases.items()
    )
    outcome = outcome_of(f"<testsuites><testsuite>{written}</testsuite></testsuites>")
    assert outcome.asserted == ("t::judged", "t::raised_nothing")
    assert outcome.broken == ("t::wrong_shape", "t::timed_out", "t::not_imported")
    assert outcome.passed == 1


def test_the_unchanged_copy_passes_and_a_trap_put_back_does_not(repository: Path, tmp_path: Path) -> None:
    tests = named_test(QUICK, repository)
    copy = private_copy(repository, tmp_path)
    assert_passes(copy, tests)
    put_back(QUICK, copy)
    assert run_tests(copy, tests).asserted


@pytest.mark.traps
@pytest.mark.timeout(SLOW)
@pytest.mark.parametrize("trap", sorted({change.trap for change in CHANGES}))
def test_the_unchanged_source_passes_the_tests_of(trap: int, repository: Path, tmp_path: Path) -> None:
    assert_passes(private_copy(repository, tmp_path), named_tests(repository)[trap])


@pytest.mark.traps
@pytest.mark.timeout(SLOW)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_put_back(change: Change, repository: Path, tmp_path: Path, caught: Caught) -> None:
    copy = private_copy(repository, tmp_path)
    put_back(change, copy)
    outcome = run_tests(copy, named_test(change, repository))
    assert outcome.asserted, (outcome.broken, outcome.output[-3000:])
    caught[change] = outcome.asserted[0]


def assert_passes(copy: Path, tests: list[str]) -> None:
    outcome = run_tests(copy, tests)
    assert not outcome.asserted + outcome.broken, outcome.output[-3000:]
    assert outcome.passed >= len(tests), outcome.output[-3000:]
