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

`reason` is stable and in the table of reasons.py; the message holds the values and what to do next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cola_runtime.reasons import REASONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One thing that is wrong in the input, and where: a field path or `file:line:column`."""

    where: str
    message: str


class ColaError(Exception):
    """Base of the tree. `str(error)` is one or more full sentences for the person who must act."""

    exit_code: ClassVar[int] = 1
    grpc_code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
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
        """The error's text fields, as they travel in gRPC ErrorInfo metadata."""
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
    grpc_code = "INVALID_ARGUMENT"
    http_status = 422


class Unauthenticated(ColaError):
    exit_code = 4
    grpc_code = "UNAUTHENTICATED"
    http_status = 401


class PermissionDenied(ColaError):
    exit_code = 4
    grpc_code = "PERMISSION_DENIED"
    http_status = 403


class NotFound(ColaError):
    exit_code = 5
    grpc_code = "NOT_FOUND"
    http_status = 404


class Conflict(ColaError):
    exit_code = 6
    grpc_code = "FAILED_PRECONDITION"
    http_status = 409


class QuotaExceeded(ColaError):
    exit_code = 7
    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 429


class JobFailed(ColaError):
    exit_code = 8
    grpc_code = "ABORTED"
    http_status = 409


class Unavailable(ColaError):
    exit_code = 9
    grpc_code = "UNAVAILABLE"
    http_status = 503
    retryable = True


class ProtocolError(ColaError):
    exit_code = 9
    grpc_code = "INVALID_ARGUMENT"
    http_status = 400


class Fenced(ColaError):
    exit_code = 6
    grpc_code = "FAILED_PRECONDITION"
    http_status = 409


KINDS: tuple[type[ColaError], ...] = (
    InvalidInput,
    Unauthenticated,
    PermissionDenied,
    NotFound,
    Conflict,
    QuotaExceeded,
    JobFailed,
    Unavailable,
    ProtocolError,
    Fenced,
    ColaError,
)


def remedy_of(error: ColaError) -> str:
    """What to do: as the error says, else as the table of reasons says."""
    known = REASONS.get(error.reason)
    return error.remedy or (known.remedy if known else "")


def problem_details(error: ColaError) -> dict[str, object]:
    """The error as a problem of RFC 9457: what an HTTP door answers with, and `--json` prints.

    `type` is the reason as a URN, `title` what the table says of it, `status` its class's; the error's own
    fields, empty ones left out, and `violations` are extension members.
    """
    known = REASONS.get(error.reason)
    fields = {**error.as_dict(), "remedy": remedy_of(error)}
    detail = fields.pop("message")
    return {
        "type": f"urn:cola:reason:{error.reason}",
        "title": known.meaning if known else type(error).__name__,
        "status": error.http_status,
        "detail": detail,
        **{name: text for name, text in fields.items() if text},
        "violations": [{"where": each.where, "message": each.message} for each in error.violations],
    }
