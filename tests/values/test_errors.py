"""The error tree: text for people, fields for programs, and the way through another process."""

from __future__ import annotations

import copy

from cola_runtime.errors import ColaError, InvalidInput, Unavailable, Violation, error_from_dict

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
