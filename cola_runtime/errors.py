"""Every error a user or an operator can meet.

    ColaError                 reason, message, where, limit, actual, remedy
    |- InvalidInput           exit 3   gRPC INVALID_ARGUMENT      the request is wrong; nothing was created
    |- Unauthenticated        exit 4   gRPC UNAUTHENTICATED
    |- PermissionDenied       exit 4   gRPC PERMISSION_DENIED
    |- NotFound               exit 5   gRPC NOT_FOUND             also: belongs to another tenant
    |- Conflict               exit 6   gRPC FAILED_PRECONDITION   the object is in another state
    |- QuotaExceeded          exit 7   gRPC RESOURCE_EXHAUSTED
    |- JobFailed              exit 8   gRPC ABORTED               the job ended without a result
    |- Unavailable            exit 9   gRPC UNAVAILABLE           try again; retryable
    |- ProtocolError          exit 9   gRPC INVALID_ARGUMENT      a peer sent a bad frame or message
    |- Fenced                 exit 6   gRPC FAILED_PRECONDITION   an older lease epoch

`reason` is stable and upper case; the message holds the values and what to do next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One thing that is wrong in the input, and where: a field path or `file:line:column`."""

    where: str
    message: str


class ColaError(Exception):
    """Base of the tree. `str(error)` is one or more full sentences for the person who must act."""

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        where: str = "",
        limit: object = None,
        actual: object = None,
        remedy: str = "",
        violations: tuple[Violation, ...] = (),
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.where = where
        self.limit = None if limit is None else str(limit)
        self.actual = None if actual is None else str(actual)
        self.remedy = remedy
        self.violations = violations

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild with keyword arguments when Ray carries the error between its processes."""
        return _rebuild, (type(self), self.as_dict(), self.violations)

    def as_dict(self) -> dict[str, str | None]:
        """The error's text fields, as they travel in gRPC ErrorInfo metadata and in `--json` output."""
        return {
            "reason": self.reason,
            "message": self.message,
            "where": self.where,
            "limit": self.limit,
            "actual": self.actual,
            "remedy": self.remedy,
        }

    def __str__(self) -> str:
        head = f"{self.where}: {self.message}" if self.where else self.message
        bounds = [f"{name} {value}" for name, value in (("limit", self.limit), ("got", self.actual)) if value]
        text = head + (f" ({', '.join(bounds)})" if bounds else "")
        return f"{text}. {self.remedy}" if self.remedy else text


def _rebuild(
    kind: type[ColaError], fields: dict[str, str | None], violations: tuple[Violation, ...]
) -> ColaError:
    return error_from_dict(kind, fields, violations)


def error_from_dict(
    kind: type[ColaError], fields: dict[str, str | None], violations: tuple[Violation, ...] = ()
) -> ColaError:
    """Inverse of `as_dict`, for whoever receives an error from another process."""
    return kind(
        fields.get("reason") or "UNKNOWN",
        fields.get("message") or "",
        where=fields.get("where") or "",
        limit=fields.get("limit"),
        actual=fields.get("actual"),
        remedy=fields.get("remedy") or "",
        violations=violations,
    )


class InvalidInput(ColaError):
    exit_code = 3


class Unauthenticated(ColaError):
    exit_code = 4


class PermissionDenied(ColaError):
    exit_code = 4


class NotFound(ColaError):
    exit_code = 5


class Conflict(ColaError):
    exit_code = 6


class QuotaExceeded(ColaError):
    exit_code = 7


class JobFailed(ColaError):
    exit_code = 8


class Unavailable(ColaError):
    exit_code = 9
    retryable = True


class ProtocolError(ColaError):
    exit_code = 9


class Fenced(ColaError):
    exit_code = 6
