"""The table of reasons agrees with the code that raises them, the tests that reach them, docs/errors.md."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from cola_runtime import errors
from cola_runtime.reasons import REASONS
from cola_runtime.testing.error_reference import error_reference

ROOT = Path(__file__).resolve().parents[2]
KINDS = {kind.__name__ for kind in errors.KINDS}
CAPITALS = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")
WORD = re.compile(r"[A-Z][A-Z0-9_]+")

OTHER_NAMES = {
    "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS",  # PEFT's
    "COLA_API_KEY", "COLA_BASE_URL", "COLA_CA", "COLA_CRASH_AT", "COLA_JOIN_TOKEN", "COLA_LOG", "CRASH_AT",
    "GLIBC_TUNABLES", "GOMP_SPINCOUNT", "GRPC_SSL_CIPHER_SUITES", "LD_PRELOAD", "MALLOC_CONF",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS", "RAY_ADDRESS",
    "ENABLE_RAY_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
    "DEADLINE_EXCEEDED", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",  # gRPC's
}  # fmt: skip
"""Capitals in the package's text that are no reason: a new one is one or the other."""


def trees(folder: str) -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        if path.parent.name != "proto" and path not in (
            Path(__file__).resolve(),
            ROOT / "cola_runtime/reasons.py",
        ):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def raised() -> dict[str, set[str]]:
    """reason -> the error classes that the package makes with it, where both stand in one call."""
    found: dict[str, set[str]] = defaultdict(set)
    for _, tree in trees("cola_runtime"):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or called(node) not in KINDS or not node.args:
                continue
            if isinstance(node.args[0], ast.Constant):
                found[str(node.args[0].value)].add(called(node))
    return found


def constants(folder: str) -> Iterator[str]:
    """Every text in the code, docstrings left out."""
    for _, tree in trees(folder):
        documentation = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in documentation
            ):
                yield node.value


def test_every_reason_that_is_raised_is_in_the_table_with_its_classes() -> None:
    found = raised()
    assert len(found) > 150
    assert found.keys() <= REASONS.keys()
    wrong = {reason: kinds for reason, kinds in found.items() if kinds != set(REASONS[reason].kinds)}
    indirect = {name for name, reason in REASONS.items() if reason.kinds and name not in found}
    assert not wrong, "the table names other classes"
    assert all(REASONS[name].kinds == ("InvalidInput",) for name in indirect), "checks of rows and specs"


def test_no_capitals_in_the_package_are_a_reason_that_the_table_lacks() -> None:
    whole = {text for text in constants("cola_runtime") if CAPITALS.fullmatch(text)}
    assert not whole - REASONS.keys() - OTHER_NAMES


def test_no_row_of_the_table_is_left_over() -> None:
    assert not REASONS.keys() - set(constants("cola_runtime"))


def test_every_row_is_reached_by_a_test() -> None:
    named = {word for text in constants("tests") for word in WORD.findall(text)}
    unreached = {name for name in REASONS if name not in named}
    assert not unreached, "what is added to the table comes with a test that reaches it"


def test_every_row_says_what_it_means_and_what_to_do() -> None:
    for reason in REASONS.values():
        assert reason.meaning.endswith(".") and reason.remedy.endswith((".", "`."))
        assert set(reason.kinds) <= KINDS


def test_an_error_without_a_remedy_of_its_own_gets_the_tables() -> None:
    bare = errors.NotFound("JOB_UNKNOWN", "there is no job 'x'")
    assert errors.remedy_of(bare) == REASONS["JOB_UNKNOWN"].remedy
    assert errors.remedy_of(errors.NotFound("JOB_UNKNOWN", "x", remedy="Look.")) == "Look."


def test_the_page_of_errors_is_made_of_the_table() -> None:
    assert (ROOT / "docs/errors.md").read_text(encoding="utf-8") == error_reference(), "run `make errors`"
