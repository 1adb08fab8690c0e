"""What the SDK does when the service goes away for a while."""

from __future__ import annotations

import threading
from pathlib import Path

import grpc
import pytest
from serving import ROWS, Served, serving

from cola_runtime.client import channel
from cola_runtime.client.channel import call_metadata, parse_base_url
from cola_runtime.client.sdk import Client
from cola_runtime.config import ClientSettings
from cola_runtime.errors import InvalidInput, PermissionDenied, Unauthenticated, Unavailable
from cola_runtime.server.grpc_server import SERVER_OPTIONS
from cola_runtime.server.limits import Limits
from cola_runtime.spec import JobSpec
from cola_runtime.transport.status import SDK_METADATA


def test_a_call_is_tried_again_until_the_service_is_back(client: Client, served: Served) -> None:
    client.describe()
    served.run(served.hang_up())
    back = threading.Timer(0.5, lambda: served.run(served.listen()))
    back.start()
    assert client.describe().tenant == "alice"
    back.join()


def test_a_submission_that_was_lost_on_the_way_back_makes_one_job(
    client: Client, spec: JobSpec, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, calls = served.service.submit, []

    async def answer_is_lost(*arguments: object) -> object:
        job = await submit(*arguments)  # type: ignore[arg-type]
        calls.append(job.job_id)
        if len(calls) == 1:
            raise Unavailable("STORE_BUSY", "the answer is lost")
        return job

    monkeypatch.setattr(served.service, "submit", answer_is_lost)
    handle = client.submit(spec, training=ROWS)
    assert calls == [handle.job_id, handle.job_id]
    assert [job.job_id for job in client.jobs()] == [handle.job_id]
    assert served.stored_files() == [f"datasets/{handle.job_id}/training.jsonl"]


def test_a_key_is_not_created_twice(client: Client, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def busy(*arguments: object, **options: object) -> str:
        calls.append(arguments)
        raise Unavailable("STORE_BUSY", "try again")

    calls: list[object] = []
    monkeypatch.setattr(served.store, "create_key", busy)
    with pytest.raises(Unavailable):
        client.create_key("carol")
    assert len(calls) == 1


def test_the_event_stream_goes_on_after_a_restart_without_gap_or_repetition(
    client: Client, spec: JobSpec, served: Served
) -> None:
    handle = client.submit(spec, training=ROWS)
    served.train(handle.job_id, steps=2)
    seen = []
    for event in handle.events():
        seen.append(event)
        if event.kind == "step.applied" and event.data["step"] == 2:
            served.run(served.hang_up())
            served.run(served.listen())
            served.train(handle.job_id, steps=3, succeed=True)
    known = served.run(served.store.events(handle.job_id))
    assert [event.id for event in seen] == [event.id for event in known]
    assert [event.data["step"] for event in seen if event.kind == "step.applied"] == [1, 2, 3, 4, 5]


def test_events_go_on_behind_a_known_one(client: Client, spec: JobSpec, served: Served) -> None:
    handle = client.submit(spec, training=ROWS)
    served.train(handle.job_id, steps=5, succeed=True)
    everything = list(handle.events())
    assert list(handle.events(after=everything[3].id)) == everything[4:]


def test_a_silent_stream_is_not_taken_for_a_ping_flood(
    served: Served, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Production's 30 s and 10 s, as fast as gRPC pings: five in silence, where three are too many."""
    pings = "grpc.http2.min_ping_interval_without_data_ms"
    assert dict(SERVER_OPTIONS)[pings] < channel.KEEPALIVE_MILLISECONDS
    faster = tuple((name, 300 if name == pings else value) for name, value in SERVER_OPTIONS)
    monkeypatch.setattr("cola_runtime.server.grpc_server.SERVER_OPTIONS", faster)
    monkeypatch.setattr(channel, "KEEPALIVE_MILLISECONDS", 1000)
    monkeypatch.setattr("cola_runtime.client.job_handle.RECONNECT_FOR_SECONDS", -1.0)  # a lost stream shows
    served.run(served.hang_up())
    served.run(served.listen())
    with Client(base_url=served.url, api_key=served.keys["alice"]) as client:
        handle = client.submit(spec, training=ROWS)
        threading.Timer(5.5, lambda: served.run(served.runner.cancel(handle.job_id))).start()
        assert [event.kind for event in handle.events()][-1] == "job.cancelled"


def test_leaving_the_event_loop_early_ends_the_stream(client: Client, spec: JobSpec) -> None:
    events = client.submit(spec, training=ROWS).events()
    assert next(events).kind == "job.queued"
    events.close()
    assert client.describe().tenant == "alice"


@pytest.mark.timeout(30)
def test_a_revoked_key_ends_a_running_stream(tmp_path: Path, tokenizer_path: Path, spec: JobSpec) -> None:
    limits = Limits(key_check_seconds=0.05)
    with (
        serving(tmp_path, tokenizer_path, limits) as served,
        Client(base_url=served.url, api_key=served.keys["alice"]) as client,
    ):
        events = client.submit(spec, training=ROWS).events()
        next(events), next(events)
        for key in served.run(served.store.keys()):
            served.run(served.store.revoke_key(key.key_id))
        with pytest.raises(Unauthenticated) as caught:
            next(events)
    assert caught.value.reason == "KEY_UNKNOWN"


def test_a_read_only_key_reads_and_does_not_submit(served: Served, spec: JobSpec) -> None:
    with Client(base_url=served.url, api_key=served.keys["reader"]) as reader:
        assert reader.jobs() == []
        with pytest.raises(PermissionDenied, match="jobs:write"):
            reader.submit(spec, training=ROWS)
    assert served.nothing_exists()


@pytest.mark.parametrize(
    ("url", "target", "tls"),
    [
        ("grpc://127.0.0.1:9000", "127.0.0.1:9000", False),
        ("grpc://example.org", "example.org:8421", False),
        ("grpcs://example.org:443/", "example.org:443", True),
        ("example.org:9000", "example.org:9000", False),
        ("grpc://[::1]:9000", "[::1]:9000", False),
    ],
)
def test_addresses(url: str, target: str, tls: bool) -> None:
    address = parse_base_url(url)
    assert (address.target, address.tls) == (target, tls)


@pytest.mark.parametrize(
    "url", ["http://a:1", "grpc://", "grpc://a:99999", "grpc://a/path", "grpc://user@a:1", "grpc://a:b"]
)
def test_bad_addresses_are_refused_with_the_form_that_is_expected(url: str) -> None:
    with pytest.raises(InvalidInput, match="grpc://host:port") as caught:
        parse_base_url(url)
    assert caught.value.where == "COLA_BASE_URL"


def test_a_key_that_cannot_be_one_is_refused_here() -> None:
    with pytest.raises(InvalidInput, match="COLA_API_KEY"):
        call_metadata(ClientSettings(api_key="tml-\n"[:4] + "é"))  # type: ignore[arg-type]
    assert dict(call_metadata(ClientSettings())).keys() == {SDK_METADATA}


def test_an_error_of_the_service_arrives_whole(client: Client, spec: JobSpec) -> None:
    with pytest.raises(InvalidInput) as caught:
        client.submit(spec, training=b'{"text": "a"}\n{"text": }\n', evaluation=ROWS)
    assert caught.value.violations[0].where == "training.jsonl:2:10"
    assert isinstance(caught.value.__cause__, grpc.RpcError)
