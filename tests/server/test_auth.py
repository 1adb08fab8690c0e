"""What a call needs to be let in at all, whichever verb it asks for."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass
from serving import ROWS, Served

from cola_runtime.client.sdk import Client
from cola_runtime.errors import ColaError, Unauthenticated
from cola_runtime.proto import jobs_pb2, jobs_pb2_grpc
from cola_runtime.server.grpc_server import SERVICE
from cola_runtime.server.limits import Limits
from cola_runtime.server.rpc import RpcHandlers
from cola_runtime.server.rules import rules_of
from cola_runtime.spec import JobSpec
from cola_runtime.transport.status import error_from_rpc

METHODS = {method.name: method for method in SERVICE.methods}


def call(served: Served, rpc: str, key: str | None, **fields: Any) -> ColaError | None:
    """The error of one call with the generated stub, or None."""
    method = METHODS[rpc]
    request = GetMessageClass(method.input_type)(**fields)
    metadata = [] if key is None else [("authorization", f"Bearer {key}")]
    with grpc.insecure_channel(served.target) as channel:
        stub = getattr(jobs_pb2_grpc.JobsStub(channel), rpc)
        try:
            answer = stub(
                iter([request]) if method.client_streaming else request, metadata=metadata, timeout=10
            )
            list(answer) if method.server_streaming else answer
        except grpc.RpcError as failure:
            return error_from_rpc(failure)
    return None


def test_a_method_without_implementation_stops_the_server_from_starting(served: Served) -> None:
    handlers = RpcHandlers(served.store, served.service.recall, Limits())
    methods: dict[str, Any] = dict.fromkeys(METHODS, lambda request, call: None)
    for missing in METHODS:
        fewer = {name: method for name, method in methods.items() if name != missing}
        with pytest.raises(KeyError, match=missing):
            handlers.generic_handler(SERVICE, methods=fewer, rules=rules_of(SERVICE))


def test_no_rpc_answers_without_a_known_key(served: Served) -> None:
    for rpc in METHODS:
        for key, reason in (
            (None, "KEY_MISSING"),
            ("", "KEY_MISSING"),
            ("x" * 600, "KEY_MISSING"),
            ("tml-wrong", "KEY_UNKNOWN"),
        ):
            error = call(served, rpc, key)
            assert isinstance(error, Unauthenticated), rpc
            assert (error.reason, "COLA_API_KEY" in error.remedy) == (reason, True), rpc


def test_another_tenants_cursor_is_refused(client: Client, served: Served, spec: JobSpec) -> None:
    job_id = client.submit(spec, training=ROWS).job_id
    error = call(served, "ListJobs", served.keys["bob"], after=job_id)
    assert error is not None
    assert error.reason == "CURSOR_INVALID"


def test_two_keys_in_one_call_are_none(served: Served) -> None:
    keys = [("authorization", f"Bearer {served.keys[name]}") for name in ("alice", "bob")]
    with grpc.insecure_channel(served.target) as channel, pytest.raises(grpc.RpcError) as caught:
        jobs_pb2_grpc.JobsStub(channel).ListJobs(jobs_pb2.ListJobsRequest(), metadata=keys, timeout=10)
    assert error_from_rpc(caught.value).reason == "KEY_MISSING"


def test_an_unexpected_failure_says_nothing_of_the_inside(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret /path of SELECT 1")

    monkeypatch.setattr(served.service, "describe", broken)
    error = call(served, "DescribeService", served.keys["alice"])
    assert error is not None
    assert error.reason == "INTERNAL"
    assert "secret" not in str(error)
    assert "secret" in caplog.text  # the operator sees it
