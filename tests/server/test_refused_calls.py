"""Calls that the service refuses, over the wire, each with its reason."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from serving import ROWS, Served, serving

from cola_runtime.client.sdk import Client
from cola_runtime.errors import ColaError
from cola_runtime.jobs.state import Trigger
from cola_runtime.proto import jobs_pb2, jobs_pb2_grpc
from cola_runtime.server.limits import Limits
from cola_runtime.spec import JobSpec
from cola_runtime.transport.status import error_from_rpc


def refused(served: Served, verb: str, request: Any, *, streams: bool = False) -> ColaError:
    metadata = [("authorization", f"Bearer {served.keys['alice']}")]
    with grpc.insecure_channel(served.target) as channel:
        stub = getattr(jobs_pb2_grpc.JobsStub(channel), verb)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub(iter(request) if streams else request, metadata=metadata, timeout=10))
    return error_from_rpc(caught.value)


def test_a_header_that_is_too_long_says_which_field_and_how_long(served: Served) -> None:
    header = jobs_pb2.JobHeader(spec_json="{}", idempotency_key="k" * 201)
    error = refused(served, "SubmitJob", [jobs_pb2.SubmitJobRequest(header=header)], streams=True)
    assert (error.reason, error.where, error.limit, error.actual) == (
        "HEADER_INVALID",
        "idempotency_key",
        "200",
        "201",
    )


def test_a_version_without_checkpoint_is_not_found(client: Client, served: Served, spec: JobSpec) -> None:
    job_id = client.submit(spec, training=ROWS).job_id
    served.train(job_id, steps=1)
    served.checkpoint(job_id)
    error = refused(served, "ExportAdapter", jobs_pb2.ExportAdapterRequest(job_id=job_id, version=7))
    assert (error.reason, "It has: 1" in error.remedy) == ("CHECKPOINT_UNKNOWN", True)


def test_a_call_that_takes_too_long_ends_with_its_limit(tmp_path: Path, tokenizer_path: Path) -> None:
    with serving(tmp_path, tokenizer_path, Limits(call_seconds=0.05)) as served:

        async def slow(*_: object, **__: object) -> None:
            await asyncio.sleep(30)

        served.service.jobs = slow  # type: ignore[method-assign,assignment]
        error = refused(served, "ListJobs", jobs_pb2.ListJobsRequest())
        assert (error.reason, error.limit) == ("CALL_TIMEOUT", "0.05 s")


def test_a_job_that_failed_without_a_reason_has_one(client: Client, served: Served, spec: JobSpec) -> None:
    job_id = client.submit(spec, training=ROWS).job_id
    served.run(served.store.transition(job_id, Trigger.START))
    served.run(served.store.transition(job_id, Trigger.FAIL))
    assert client.job(job_id).job.failure_reason == "JOB_FAILED"


def test_bytes_that_are_no_message_are_refused_and_only_to_a_known_key(served: Served) -> None:
    with grpc.insecure_channel(served.target) as channel:
        for verb, kind in (("GetJob", "unary_unary"), ("SubmitJob", "stream_unary")):
            for key, reason in ((served.keys["alice"], "REQUEST_INVALID"), ("tml-guess", "KEY_UNKNOWN")):
                call = getattr(channel, kind)(f"/cola.v1.Jobs/{verb}")
                sent = b"\xff\xff" if kind == "unary_unary" else iter([b"\xff\xff"])
                with pytest.raises(grpc.RpcError) as caught:
                    call(sent, metadata=[("authorization", f"Bearer {key}")], timeout=10)
                assert error_from_rpc(caught.value).reason == reason
