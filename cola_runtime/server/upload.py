"""Receives a job's header and data from a client stream, counting before it keeps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cola_runtime.errors import InvalidInput, QuotaExceeded, Unavailable
from cola_runtime.jobs.records import Tenant
from cola_runtime.proto import jobs_pb2
from cola_runtime.server.admission import Submission
from cola_runtime.server.limits import Limits


class UploadGate:
    """At most so many uploads are in memory at a time; the next ones wait in order, unread."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._places = asyncio.Semaphore(limits.concurrent_uploads)
        self._of_tenants: dict[str, asyncio.Semaphore] = {}

    @asynccontextmanager
    async def pass_one(self, tenant: Tenant) -> AsyncIterator[None]:
        """Raises Unavailable `UPLOADS_BUSY` when no place was free in time; clients try again."""
        own = self._of_tenants.setdefault(
            tenant.tenant_id, asyncio.Semaphore(self._limits.uploads_of_a_tenant)
        )
        try:
            async with asyncio.timeout(self._limits.upload_wait_seconds):
                await own.acquire()
                try:
                    await self._places.acquire()
                except BaseException:
                    own.release()
                    raise
        except TimeoutError:
            raise Unavailable(
                "UPLOADS_BUSY",
                f"no upload ended within {self._limits.upload_wait_seconds:g} s",
                limit=f"{self._limits.concurrent_uploads} at once, "
                f"{self._limits.uploads_of_a_tenant} of a tenant",
                remedy="Try again in a moment.",
            ) from None
        try:
            yield
        finally:
            self._places.release()
            own.release()


async def receive_submission(
    requests: AsyncIterator[jobs_pb2.SubmitJobRequest], limits: Limits
) -> Submission:
    """The submission in a client stream: one header, then chunks, none of it over its limit.

    Raises InvalidInput `STREAM_ORDER`, `HEADER_INVALID`, QuotaExceeded `DATASET_TOO_LARGE`, Unavailable
    `STREAM_STALLED`.
    """
    header: jobs_pb2.JobHeader | None = None
    received = {"training_chunk": bytearray(), "evaluation_chunk": bytearray()}
    async for request in _in_time(requests, limits):
        part = request.WhichOneof("part")
        if part in received and header is not None:
            _append(received[part], getattr(request, part), part, limits)
        elif part == "header" and header is None:
            header = _checked(request.header, limits)
        else:
            raise _out_of_order("a submission is one header first, then chunks of data")
    if header is None:
        raise _out_of_order("the submission ended before its header")
    return Submission(
        spec_json=header.spec_json,
        training=bytes(received["training_chunk"]),
        training_name=header.training_name or "training",
        evaluation=bytes(received["evaluation_chunk"]) if _has_evaluation(header, received) else None,
        evaluation_name=header.evaluation_name,
        idempotency_key=header.idempotency_key,
    )


def _has_evaluation(header: jobs_pb2.JobHeader, received: dict[str, bytearray]) -> bool:
    """A named but empty held-out file is a mistake to report, not one to overlook."""
    return bool(header.evaluation_name or received["evaluation_chunk"])


async def _in_time(
    requests: AsyncIterator[jobs_pb2.SubmitJobRequest], limits: Limits
) -> AsyncIterator[jobs_pb2.SubmitJobRequest]:
    iterator = aiter(requests)
    seconds = limits.chunk_seconds
    received_bytes, began = 0, time.monotonic()
    while True:
        try:
            async with asyncio.timeout(seconds):
                request = await anext(iterator)
            received_bytes += request.ByteSize()
            late = time.monotonic() - began - seconds
            if received_bytes < late * limits.upload_bytes_per_second:
                raise Unavailable(
                    "STREAM_STALLED",
                    "the upload is slower than one may be",
                    limit=f"{limits.upload_bytes_per_second} bytes a second",
                    remedy="Try again over a faster link.",
                )
            yield request
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Unavailable(
                "STREAM_STALLED",
                "the upload stood still",
                limit=f"{seconds:g} s without data",
                remedy="Try again.",
            ) from None


def _append(buffer: bytearray, chunk: bytes, part: str, limits: Limits) -> None:
    if len(buffer) + len(chunk) > limits.dataset_bytes:
        raise QuotaExceeded(
            "DATASET_TOO_LARGE",
            f"the {part.removesuffix('_chunk')} data are larger than a job's data may be",
            limit=f"{limits.dataset_bytes} bytes",
            actual=f"over {len(buffer)} bytes",
            remedy="Send fewer rows. Nothing was created.",
        )
    buffer += chunk


def _checked(header: jobs_pb2.JobHeader, limits: Limits) -> jobs_pb2.JobHeader:
    for name, most in (
        ("spec_json", limits.spec_bytes),
        ("training_name", limits.file_name_characters),
        ("evaluation_name", limits.file_name_characters),
        ("idempotency_key", limits.idempotency_key_characters),
    ):
        if len(getattr(header, name)) > most:
            raise InvalidInput(
                "HEADER_INVALID",
                f"{name} is too long",
                where=name,
                limit=most,
                actual=len(getattr(header, name)),
            )
    return header


def _out_of_order(problem: str) -> InvalidInput:
    return InvalidInput("STREAM_ORDER", problem, remedy="Use the SDK, or send the parts in order.")
