"""What comes in over a client stream is counted before it is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from serving import ROWS, Served, serving

from cola_runtime.client.sdk import AsyncClient
from cola_runtime.errors import ColaError, InvalidInput, QuotaExceeded, Unavailable
from cola_runtime.jobs.records import Tenant
from cola_runtime.proto.jobs_pb2 import JobHeader, SubmitJobRequest
from cola_runtime.server.limits import Limits
from cola_runtime.server.upload import UploadGate, receive_submission
from cola_runtime.spec import JobSpec

HEADER = SubmitJobRequest(header=JobHeader(spec_json="{}", training_name="train.jsonl"))
TENANT = Tenant(tenant_id="t", name="acme", created_at="2026-01-02T03:04:05Z")
SMALL = Limits(dataset_bytes=10, chunk_seconds=0.05)


def training(content: bytes) -> SubmitJobRequest:
    return SubmitJobRequest(training_chunk=content)


def evaluation(content: bytes) -> SubmitJobRequest:
    return SubmitJobRequest(evaluation_chunk=content)


class Stream:
    """Counts how much of it was taken."""

    def __init__(self, requests: Iterable[SubmitJobRequest], *, then_stall: bool = False) -> None:
        self.requests = list(requests)
        self.taken = 0
        self.then_stall = then_stall

    async def __aiter__(self) -> AsyncIterator[SubmitJobRequest]:
        for request in self.requests:
            self.taken += 1
            yield request
        if self.then_stall:
            await asyncio.Event().wait()


async def test_chunks_are_joined_in_order() -> None:
    parts = [HEADER, training(b"ab"), evaluation(b"x"), training(b"cd"), evaluation(b"y")]
    got = await receive_submission(Stream(parts), SMALL)
    assert (got.training, got.evaluation, got.training_name) == (b"abcd", b"xy", "train.jsonl")


async def test_a_held_out_file_that_is_named_is_never_overlooked() -> None:
    header = SubmitJobRequest(header=JobHeader(evaluation_name="held.jsonl"))
    assert (await receive_submission(Stream([header]), SMALL)).evaluation == b""
    assert (await receive_submission(Stream([HEADER]), SMALL)).evaluation is None


@pytest.mark.parametrize("chunk", [training, evaluation])
async def test_the_first_byte_above_the_limit_ends_the_upload(chunk: object) -> None:
    stream = Stream([HEADER, *[chunk(b"12345")] * 100])  # type: ignore[operator]
    with pytest.raises(QuotaExceeded, match="limit 10 bytes") as caught:
        await receive_submission(stream, SMALL)
    assert caught.value.reason == "DATASET_TOO_LARGE"
    assert stream.taken == 4


@pytest.mark.parametrize(
    "parts",
    [[], [training(b"a")], [HEADER, HEADER], [SubmitJobRequest()], [HEADER, SubmitJobRequest()]],
    ids=["nothing", "data first", "two headers", "empty", "empty later"],
)
async def test_parts_out_of_order_are_refused(parts: list[SubmitJobRequest]) -> None:
    with pytest.raises(InvalidInput) as caught:
        await receive_submission(Stream(parts), SMALL)
    assert caught.value.reason == "STREAM_ORDER"


async def test_an_upload_that_stands_still_ends() -> None:
    with pytest.raises(Unavailable) as caught:
        await receive_submission(Stream([HEADER], then_stall=True), SMALL)
    assert caught.value.reason == "STREAM_STALLED"


@pytest.mark.parametrize("field", ["spec_json", "training_name", "evaluation_name", "idempotency_key"])
async def test_a_long_header_field_is_named(field: str) -> None:
    header = SubmitJobRequest(header=JobHeader(**{field: "x" * 100_000}))
    with pytest.raises(InvalidInput) as caught:
        await receive_submission(Stream([header]), Limits())
    assert caught.value.where == field


async def test_the_gate_keeps_the_next_upload_waiting_until_one_ends() -> None:
    gate = UploadGate(Limits(concurrent_uploads=1, uploads_of_a_tenant=3))
    inside: list[str] = []

    async def upload(name: str) -> None:
        async with gate.pass_one(TENANT):
            inside.append(name)

    async with gate.pass_one(TENANT):
        waiting = [asyncio.create_task(upload(name)) for name in ("first", "second")]
        await asyncio.sleep(0.01)
        assert inside == []
    await asyncio.gather(*waiting)
    assert inside == ["first", "second"]


async def test_an_upload_that_waits_too_long_is_told_to_try_again() -> None:
    gate = UploadGate(Limits(concurrent_uploads=1, uploads_of_a_tenant=3, upload_wait_seconds=0.01))
    async with gate.pass_one(TENANT):
        with pytest.raises(Unavailable) as caught:
            async with gate.pass_one(TENANT):
                pass
    assert (caught.value.reason, caught.value.limit) == ("UPLOADS_BUSY", "1 at once, 3 of a tenant")
    async with gate.pass_one(TENANT):
        pass


async def test_a_client_that_vanishes_in_the_middle_leaves_nothing(served: Served, spec: JobSpec) -> None:
    async with AsyncClient(base_url=served.url, api_key=served.keys["alice"]) as client:

        async def chunks() -> AsyncIterator[SubmitJobRequest]:
            yield SubmitJobRequest(header=JobHeader(spec_json=spec.model_dump_json()))
            yield training(ROWS)
            begun.set()
            await asyncio.Event().wait()

        begun = asyncio.Event()
        call = asyncio.create_task(client._connection.call("SubmitJob", chunks))
        await asyncio.wait_for(begun.wait(), 10)
        call.cancel()
        assert (await client.describe()).tenant == "alice"
    assert await asyncio.to_thread(served.nothing_exists)


async def test_a_dataset_over_the_limit_is_refused_over_the_wire(
    tmp_path: Path, tokenizer_path: Path, spec: JobSpec
) -> None:
    with serving(tmp_path, tokenizer_path, Limits(dataset_bytes=100_000)) as served:
        async with AsyncClient(base_url=served.url, api_key=served.keys["alice"]) as client:
            with pytest.raises(ColaError) as caught:
                await client.submit(spec, training=ROWS * 1000)
            assert (caught.value.reason, caught.value.limit) == ("DATASET_TOO_LARGE", "100000 bytes")
        assert await asyncio.to_thread(served.nothing_exists)


async def test_a_chunk_above_grpcs_limit_is_refused_and_the_connections_event_stream_goes_on(
    served: Served, spec: JobSpec
) -> None:
    async with AsyncClient(base_url=served.url, api_key=served.keys["alice"]) as client:
        handle = await client.submit(spec, training=ROWS)
        events = handle.events()
        assert (await anext(events)).kind == "job.queued"

        async def chunks() -> AsyncIterator[SubmitJobRequest]:
            yield SubmitJobRequest(header=JobHeader(spec_json=spec.model_dump_json()))
            yield training(bytes(Limits().message_bytes + 1))

        with pytest.raises(QuotaExceeded, match=f"vs. {Limits().message_bytes}"):
            await client._connection.call("SubmitJob", chunks)
        await handle.cancel()
        assert [event.kind async for event in events][-1] == "job.cancelled"
    assert await asyncio.to_thread(served.stored_files) == [f"datasets/{handle.job_id}/training.jsonl"]


class Drip:
    """One byte after another, each in time."""

    async def __aiter__(self) -> AsyncIterator[SubmitJobRequest]:
        yield HEADER
        while True:
            await asyncio.sleep(0.01)
            yield training(b"a")


async def test_an_upload_that_drips_ends_too() -> None:
    limits = Limits(chunk_seconds=0.5, upload_bytes_per_second=10_000)  # no loop is that late
    with pytest.raises(Unavailable) as caught:
        await asyncio.wait_for(receive_submission(Drip(), limits), 5)  # type: ignore[arg-type]
    assert (caught.value.reason, caught.value.limit) == ("STREAM_STALLED", "10000 bytes a second")


async def test_one_tenants_slow_uploads_leave_places_to_the_others() -> None:
    gate = UploadGate(Limits(concurrent_uploads=3, uploads_of_a_tenant=2, upload_wait_seconds=0.2))
    slow, other = TENANT, Tenant(tenant_id="other", name="other", created_at="2026-01-02T03:04:05Z")
    async with gate.pass_one(slow), gate.pass_one(slow):
        with pytest.raises(Unavailable) as caught:
            async with gate.pass_one(slow):
                pass
        assert caught.value.reason == "UPLOADS_BUSY"
        async with gate.pass_one(other):
            pass
    async with gate.pass_one(slow), gate.pass_one(slow):
        pass  # the places came back
