"""Collecting what is wrong with a file, so that a tenant corrects everything at once."""

from __future__ import annotations

from cola_runtime.errors import InvalidInput, Violation

MAX_REPORTED_VIOLATIONS = 20


class Problem(Exception):
    """One line is wrong: a reason code, what is wrong with it, and at which column. Never leaves `data`."""

    def __init__(
        self, reason: str, message: str, *, column: int = 1, limit: object = None, actual: object = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.column = column  # in characters, from 1
        self.limit = limit
        self.actual = actual


class Problems:
    """The wrong lines of one file: the first 20 with their places, and the number of all."""

    def __init__(self, file_name: str, *, remedy: str) -> None:
        self.count = 0
        self._file_name = file_name
        self._remedy = remedy
        self._first: Problem | None = None
        self._violations: list[Violation] = []

    def add(self, problem: Problem, *, line: int) -> None:
        """Note the one problem of a line."""
        self.count += 1
        self._first = self._first or problem
        if len(self._violations) < MAX_REPORTED_VIOLATIONS:
            where = f"{self._file_name}:{line}:{problem.column}"
            self._violations.append(Violation(where=where, message=problem.message))

    def raise_if_any(self) -> None:
        """Raise InvalidInput with the first problem's reason and place, and all the others counted."""
        if self._first is None:
            return
        raise InvalidInput(
            self._first.reason,
            self._first.message + self._others(),
            where=self._violations[0].where,
            limit=self._first.limit,
            actual=self._first.actual,
            remedy=self._remedy,
            violations=tuple(self._violations),
        )

    def _others(self) -> str:
        match self.count - 1:
            case 0:
                return ""
            case 1:
                return "; 1 more line has an error"
            case others:
                return f"; {others} more lines have errors"
