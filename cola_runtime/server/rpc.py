"""One gRPC method at a time: admitted by its rule, bounded in time, its errors mapped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from cola_runtime import ids
from cola_runtime.errors import (
    ColaError,
    InvalidInput,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from cola_runtime.jobs.audit import AuditEntry
from cola_runtime.jobs.recall import Recall
from cola_runtime.jobs.records import Tenant
from cola_runtime.jobs.store import JobStore
from cola_runtime.proto import jobs_pb2
from cola_runtime.server.auth import authenticate, check_sdk
from cola_runtime.server.limits import Limits
from cola_runtime.server.rules import READ, Owner, Rule
from cola_runtime.transport.host_calls import caller_known
from cola_runtime.transport.status import abort_with

NOBODY = Tenant(tenant_id="", name="", created_at="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a method gets besides its request."""

    tenant: Tenant  # NOBODY where no key is asked for
    key_id: str  # where no key is asked for, the caller's address
    check_key: Callable[[], Awaitable[None]]
    """For long streams, as often as they like: raises soon after the key was revoked."""


Method = Callable[[Any, Call], Any]
"""(request, call) -> response, awaitable; for a response stream an asynchronous iterator."""


class RpcHandlers:
    """Handlers of every method of a service's descriptor.

    A method without an implementation or without a rule is a KeyError here, before the server starts.
    """

    def __init__(self, store: JobStore, recall: Recall, limits: Limits) -> None:
        self._store, self._recall = store, recall
        self._limits = limits

    def generic_handler(
        self, service: ServiceDescriptor, *, methods: dict[str, Method], rules: dict[str, Rule]
    ) -> grpc.GenericRpcHandler:
        handlers = {
            method.name: self._handler(method, methods[method.name], rules[method.name])
            for method in service.methods
        }
        return grpc.method_handlers_generic_handler(service.full_name, handlers)

    def _handler(self, method: MethodDescriptor, implementation: Method, rule: Rule) -> grpc.RpcMethodHandler:
        coding = {
            "request_deserializer": _reader(GetMessageClass(method.input_type)),
            "response_serializer": GetMessageClass(method.output_type).SerializeToString,
        }
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(self._streaming(implementation, rule), **coding)
        if method.client_streaming:
            return grpc.stream_unary_rpc_method_handler(self._unary(implementation, rule), **coding)
        return grpc.unary_unary_rpc_method_handler(self._unary(implementation, rule), **coding)

    def _unary(self, implementation: Method, rule: Rule) -> Callable[[Any, Any], Awaitable[Any]]:
        seconds = getattr(self._limits, rule.deadline)

        async def serve(request: Any, context: Any) -> Any:
            try:
                async with asyncio.timeout(seconds):
                    call = await self._admit(request, context, rule)
                    response = await implementation(_readable(request), call)
                await self._note(rule, call, request, response)
                return response
            except TimeoutError:
                await abort_with(context, _too_slow(seconds))
            except Exception as error:  # the outermost line of a call
                await abort_with(context, error)

        return serve

    def _streaming(self, implementation: Method, rule: Rule) -> Callable[[Any, Any], Awaitable[None]]:
        async def serve(request: Any, context: Any) -> None:
            try:
                call = await self._admit(request, context, rule)
                responses: AsyncIterator[Any] = implementation(_readable(request), call)
                noted = False
                async for response in responses:
                    if not noted:
                        await self._note(rule, call, request, response)
                        noted = True
                    async with asyncio.timeout(self._limits.chunk_seconds):
                        await context.write(response)
            except TimeoutError:
                await abort_with(context, _too_slow(self._limits.chunk_seconds))
            except Exception as error:  # the outermost line of a call
                await abort_with(context, error)

        return serve

    async def _admit(self, request: Any, context: Any, rule: Rule) -> Call:
        """The call, if the rule allows it. A reference to a job becomes the full id of the tenant's own job.

        So a method that forgot to look whose job it is has no other tenant's to forget it of. An empty
        reference names no object.
        """
        check_sdk(tuple(context.invocation_metadata() or ()))
        peer = _host(context.peer())
        if rule.owner is Owner.NEWCOMER:
            _readable(request)
            return Call(tenant=NOBODY, key_id=peer, check_key=_no_key)
        try:
            call = await self._call(context, rule)
        except (Unauthenticated, PermissionDenied) as error:
            await self._refused("login.refused", peer, error)
            raise
        caller_known()
        _readable(request)  # behind the key: a stranger does not hear what is wrong with a message
        if rule.owner is Owner.JOB and request.job_id:
            try:
                job = await self._reads(rule).find_job(call.tenant.tenant_id, request.job_id)
            except NotFound as error:
                await self._refused("job.not_found", call.key_id, error)
                raise
            request.job_id = job.job_id
        return call

    def _reads(self, rule: Rule) -> JobStore | Recall:
        """A verb that only reads goes on while the database is away; another is refused before it begins."""
        return self._recall if rule.scope == READ else self._store

    async def _refused(self, kind: str, actor: str, error: ColaError) -> None:
        await self._store.audit.add_bounded(AuditEntry(kind=kind, actor=actor, message=error.reason))

    async def _note(self, rule: Rule, call: Call, request: Any, response: Any) -> None:
        """Leave the rule's audit entry of what has been done."""
        if rule.audit:
            told = ((name, _field(name, response, request)) for name in rule.audit_fields)
            await self._store.audit.add(
                AuditEntry(
                    kind=rule.audit,
                    actor=call.key_id,
                    tenant=call.tenant.name,
                    subject=_subject(response, request),
                    message=", ".join(f"{name} {value}" for name, value in told),
                )
            )

    async def _call(self, context: Any, rule: Rule) -> Call:
        metadata = tuple(context.invocation_metadata() or ())

        key = await authenticate(self._reads(rule), metadata, scope=rule.scope)
        checked_at = time.monotonic()

        async def check_key() -> None:
            nonlocal checked_at
            if time.monotonic() - checked_at >= self._limits.key_check_seconds:
                await authenticate(self._reads(rule), metadata, scope=rule.scope)
                checked_at = time.monotonic()

        tenant = Tenant(tenant_id=key.tenant_id, name=key.tenant_name, created_at=key.created_at)
        return Call(tenant=tenant, key_id=key.key_id, check_key=check_key)


class _Unreadable:
    """In place of a request whose bytes are no message of its type."""


def _reader(kind: type[Message]) -> Callable[[bytes], Message | _Unreadable]:
    """Parses, and never raises: what a deserializer raises, grpc tells the caller as it is."""

    def read(content: bytes) -> Message | _Unreadable:
        try:
            return kind.FromString(content)
        except (DecodeError, RecursionError):
            return _Unreadable()

    return read


def _readable(request: Any) -> Any:
    """The request, or the stream of them. Raises InvalidInput `REQUEST_INVALID`."""
    if isinstance(request, _Unreadable):
        raise InvalidInput(
            "REQUEST_INVALID",
            "the request is no message of the call's type",
            remedy="Use the SDK of this release, or generate your client from protos/ again.",
        )
    return request if isinstance(request, Message) else _each_readable(request)


async def _each_readable(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _readable(request)


async def _no_key() -> None:
    """A call without a key has none that could be revoked."""


def _host(peer: str) -> str:
    """`ipv4:127.0.0.1:50000` without the port, which every connection has another of."""
    return peer.rpartition(":")[0] or peer


def _field(name: str, *messages: Any) -> Any:
    """Of the first message that has it."""
    for message in messages:
        if isinstance(message, Message) and name in message.DESCRIPTOR.fields_by_name:
            value = getattr(message, name)
            return value if isinstance(value, str | int | float) else ", ".join(map(str, value))
    return ""


def _subject(response: Any, request: Any) -> str:
    """What was made or changed, by its id."""
    if isinstance(response, jobs_pb2.NewKey):
        return ids.key_id_of(response.key)
    names = ("job_id", "key_id", "token_id", "device_id")
    return next((str(found) for name in names if (found := _field(name, response, request))), "")


def _too_slow(seconds: float) -> ColaError:
    return Unavailable(
        "CALL_TIMEOUT",
        "the call took longer than it may",
        limit=f"{seconds:g} s",
        remedy="Try again; over a slow link, send less at a time.",
    )
