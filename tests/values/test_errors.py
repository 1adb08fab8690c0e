"""The error tree: text for people, fields for programs, and the way through another process."""

from __future__ import annotations

import copy

from google.rpc import error_details_pb2

from cola_runtime.errors import (
    ColaError,
    InvalidInput,
    QuotaExceeded,
    Unavailable,
    Violation,
    error_from_dict,
    problem_details,
)
from cola_runtime.reasons import REASONS
from cola_runtime.transport.status import status_of

ERROR = InvalidInput(
    "RANK_RANGE",
    "rank is out of range",
    where="job.adapter.rank",
    limit="1 to 256",
    actual=0,
    remedy="Give a rank from 1 to 256.",
    violations=(Violation(where="job.adapter.rank", message="out of range"),),
)


def test_the_text_holds_place_limit_actual_value_and_remedy() -> None:
    expected = "job.adapter.rank: rank is out of range (limit 1 to 256, got 0). Give a rank from 1 to 256."
    assert str(ERROR) == expected


def test_an_error_survives_its_fields_and_a_copy_through_reduce() -> None:
    for twin in (error_from_dict(InvalidInput, ERROR.as_dict(), ERROR.violations), copy.copy(ERROR)):
        assert isinstance(twin, InvalidInput)
        assert twin.as_dict() == ERROR.as_dict()
        assert twin.violations == ERROR.violations


def test_only_unavailable_is_retryable() -> None:
    def tree(kind: type[ColaError]) -> set[type[ColaError]]:
        return {kind}.union(*(tree(child) for child in kind.__subclasses__()))

    assert {kind for kind in tree(ColaError) if kind.retryable} == {Unavailable}


def test_a_problem_says_what_its_grpc_status_says() -> None:
    """RFC 9457 and google.rpc.ErrorInfo are two forms of one value."""
    error = QuotaExceeded(
        "QUOTA_JOBS",
        "too many",
        where="jobs",
        limit=64,
        actual=65,
        violations=(Violation(where="a", message="b"),),
    )
    problem = problem_details(error)
    [packed, _] = status_of(error).details
    info = error_details_pb2.ErrorInfo()
    assert packed.Unpack(info)
    named = ("where", "limit", "actual", "remedy")
    assert {name: problem[name] for name in named} == {name: info.metadata[name] for name in named}
    assert (problem["reason"], problem["detail"], problem["status"]) == (info.reason, "too many", 429)
    assert (problem["type"], problem["title"]) == (
        "urn:cola:reason:QUOTA_JOBS",
        REASONS["QUOTA_JOBS"].meaning,
    )
    assert problem["violations"] == [{"where": "a", "message": "b"}]


def test_what_an_error_does_not_say_is_not_in_its_problem() -> None:
    problem = problem_details(InvalidInput("DATASET_EMPTY", "no rows"))
    assert not {"where", "limit", "actual", "message"} & problem.keys()
    assert problem["remedy"] == REASONS["DATASET_EMPTY"].remedy
