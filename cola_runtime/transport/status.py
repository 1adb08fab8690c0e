"""ColaError <-> gRPC status. Imports neither torch nor ray: the client uses it.

A status carries google.rpc.ErrorInfo (reason, domain "cola", metadata: the error's class and text fields)
and, for violations, google.rpc.BadRequest. What is not a ColaError becomes an opaque INTERNAL with a request
id; the traceback goes to the log under that id and never to the peer.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterable
from typing import Any, NoReturn, Protocol

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from cola_runtime import errors
from cola_runtime.errors import ColaError, Violation

DOMAIN = "cola"
SDK_METADATA = "cola-sdk"
"""Of every call of this package's client: its version."""
ABORT_SECONDS = 30.0  # a slow peer may have messages before it
MAX_STATUS_BYTES = 6000  # gRPC allows 8 KiB of trailing metadata, and base64 adds a third

_DETAILS_KEY = "grpc-status-details-bin"
_OVERWRITTEN = (grpc.StatusCode.INTERNAL, "Internal error from Core")
"""What grpcio's asyncio client says instead of the server's status if it still wrote (grpc issue 36066)."""
_KIND_BY_NAME = {kind.__name__: kind for kind in errors.KINDS}
_KIND_BY_CODE = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidInput,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: errors.Conflict,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.QuotaExceeded,
    grpc.StatusCode.ABORTED: errors.JobFailed,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.Unavailable,
    grpc.StatusCode.CANCELLED: errors.Unavailable,
}

logger = logging.getLogger(__name__)


class AbortableContext(Protocol):
    """A grpc.aio servicer context, as far as ending a call is concerned."""

    async def abort_with_status(self, status: Any) -> NoReturn: ...


async def abort_with(context: AbortableContext, error: BaseException) -> NoReturn:
    """End the call with the error's status; never returns.

    A peer that is gone takes no status, and gRPC may wait without end: then the call ends as cancelled.
    """
    status = status_of(error) if isinstance(error, ColaError) else _internal_status(error)
    try:
        async with asyncio.timeout(ABORT_SECONDS):
            await context.abort_with_status(rpc_status.to_status(status))
    except TimeoutError:
        raise asyncio.CancelledError from None
    raise AssertionError("abort_with_status returned")


def status_of(error: ColaError) -> status_pb2.Status:
    """The whole error as google.rpc.Status, shortened to what gRPC lets through in trailing metadata."""
    message = error.message[: MAX_STATUS_BYTES // 4]
    status = status_pb2.Status(code=code_pb2.Code.Value(error.grpc_code), message=message)
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=_metadata(error))
    )
    if error.violations:
        _append_violations(status, error.violations)
    return status


def error_from_rpc(rpc_error: grpc.RpcError) -> ColaError:
    """The ColaError that the peer raised, or the nearest one for a status that gRPC itself made."""
    details = _status_details(rpc_error.trailing_metadata() or ())
    return _decoded(details) if details is not None else _foreign(rpc_error)


def _metadata(error: ColaError) -> dict[str, str]:
    fields = {
        name: text[:500]
        for name, text in {**error.as_dict(), "remedy": errors.remedy_of(error)}.items()
        if text and name not in ("reason", "message")
    }
    return {"kind": type(error).__name__, **fields}


def _append_violations(status: status_pb2.Status, violations: Iterable[Violation]) -> None:
    request = error_details_pb2.BadRequest()
    for violation in violations:
        request.field_violations.add(field=violation.where[:200], description=violation.message[:500])
        if status.ByteSize() + request.ByteSize() > MAX_STATUS_BYTES:
            del request.field_violations[-1]
            break
    status.details.add().Pack(request)


def _internal_status(error: BaseException) -> status_pb2.Status:
    request_id = uuid.uuid4().hex
    logger.error(
        "request %s failed unexpectedly", request_id, exc_info=error, extra={"event": "rpc.internal"}
    )
    failure = ColaError(
        "INTERNAL",
        f"the service failed on this request (request id {request_id})",
        remedy="Try again; if it happens again, give the request id to the operator.",
    )
    status = status_of(failure)
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    info.metadata["request_id"] = request_id
    status.details[0].Pack(info)
    return status


def _status_details(metadata: Iterable[tuple[str, Any]]) -> status_pb2.Status | None:
    for key, value in metadata:
        if key == _DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _decoded(status: status_pb2.Status) -> ColaError:
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        if not detail.Unpack(info):
            detail.Unpack(request)
    violations = tuple(Violation(where=v.field, message=v.description) for v in request.field_violations)
    kind = _KIND_BY_NAME.get(info.metadata.get("kind", ""), ColaError)
    fields: dict[str, str | None] = {**info.metadata, "reason": info.reason, "message": status.message}
    return errors.error_from_dict(kind, fields, violations)


def _foreign(rpc_error: grpc.RpcError) -> ColaError:
    code = rpc_error.code()
    if (code, rpc_error.details()) == _OVERWRITTEN:
        return errors.Unavailable(
            "STREAM_LOST",
            "the call ended while a message was written, and gRPC lost why",
            remedy="Try again.",
        )
    kind = _KIND_BY_CODE.get(code, ColaError)
    name = code.name if isinstance(code, grpc.StatusCode) else "UNKNOWN"
    remedy = "Check the address and that the service runs, then try again." if kind.retryable else ""
    return kind(name, f"the call ended with {name}: {rpc_error.details()}", remedy=remedy)
