"""While the job store's database is away, reads are answered from memory and say so; writes are refused."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import grpc
import pytest
from serving import ROWS, Served

from cola_runtime import clock
from cola_runtime.cli import checks
from cola_runtime.client import connection
from cola_runtime.client.sdk import Client, JobHandle
from cola_runtime.config import client_settings
from cola_runtime.errors import Unavailable, remedy_of
from cola_runtime.jobs import recall
from cola_runtime.jobs.database import Database
from cola_runtime.jobs.records import ApiKey
from cola_runtime.proto import jobs_pb2, jobs_pb2_grpc
from cola_runtime.spec import JobSpec
from tests.outages import database_away


@pytest.fixture(autouse=True)
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "RETRY_DELAYS_SECONDS", ())


@pytest.fixture
def asked() -> threading.Semaphore:
    """Counts the questions to a database that is away."""
    return threading.Semaphore(0)


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch, asked: threading.Semaphore) -> Any:
    return lambda: database_away(monkeypatch, asked=asked.release)


@pytest.fixture
def handle(client: Client, spec: JobSpec, served: Served) -> JobHandle:
    submitted = client.submit(spec, training=ROWS)
    served.train(submitted.job_id, steps=2)
    return submitted


def refused(call: Any) -> str:
    with pytest.raises(Unavailable) as caught:
        call()
    return caught.value.reason


def test_a_job_is_shown_as_it_was_last_known_and_says_that_it_is(
    client: Client, handle: JobHandle, away: Any
) -> None:
    with away():
        for job in (handle.refresh(), client.job(handle.name).job, *client.jobs()):
            assert (job.state, job.version, job.last_loss, job.stale) == ("running", 2, 2.0, True)
            assert "STORE_UNREACHABLE" in job.waiting_reason
        assert client.describe().degraded.startswith("STORE_UNREACHABLE")
    assert not handle.refresh().stale
    assert client.describe().degraded == ""


def test_writes_are_refused_with_their_reason_and_change_nothing(
    client: Client, handle: JobHandle, spec: JobSpec, served: Served, away: Any
) -> None:
    with away():
        assert refused(handle.cancel) == refused(handle.pause) == "STORE_UNREACHABLE"
        with pytest.raises(Unavailable) as caught:
            client.submit(spec, training=ROWS)
        assert "Try again" in remedy_of(caught.value)
    assert (handle.refresh().state, len(client.jobs()), served.runner.started) == (
        "running",
        1,
        [handle.job_id],
    )


def test_what_nobody_remembers_is_not_said_not_to_exist(
    client: Client, handle: JobHandle, served: Served, away: Any
) -> None:
    with away():
        assert refused(lambda: client.job("job-0")) == "STORE_UNREACHABLE"
        alice = served.tenants["alice"]
        assert refused(lambda: served.run(served.service.jobs(alice, after="job-0"))) == "STORE_UNREACHABLE"
        for key in ("tml-unknown", served.keys["bob"]):  # a key of the store's that was never used
            with Client(base_url=served.url, api_key=key) as stranger:
                assert refused(stranger.describe) == "STORE_UNREACHABLE"


def test_no_tenant_is_shown_what_is_remembered_of_another(
    handle: JobHandle, served: Served, away: Any
) -> None:
    with Client(base_url=served.url, api_key=served.keys["bob"]) as bob:
        assert bob.jobs() == []
        with away():
            assert bob.jobs() == []
            assert refused(lambda: bob.job(handle.job_id)) == "STORE_UNREACHABLE"


def key_named(served: Served, key: str) -> ApiKey:
    found = served.run(served.store.authenticate(key))
    assert found is not None
    return found  # type: ignore[no-any-return]


def test_a_key_opens_nothing_from_memory_once_it_was_revoked_or_is_long_unverified(
    client: Client, served: Served, away: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    revoked, lost = served.keys["alice"], served.keys["reader"]
    ids = {name: key_named(served, name).key_id for name in (revoked, lost)}
    served.run(served.store.revoke_key(ids[revoked]))
    with away():
        assert refused(client.describe) == "STORE_UNREACHABLE"
        with Client(base_url=served.url, api_key=lost) as reader:
            assert reader.describe().degraded
            with monkeypatch.context() as patch:
                patch.setattr(recall, "KEY_SECONDS", -1.0)
                assert refused(reader.describe) == "STORE_UNREACHABLE"
            assert refused(lambda: served.run(served.store.revoke_key(ids[lost]))) == "STORE_UNREACHABLE"
            assert refused(reader.describe) == "STORE_UNREACHABLE"


def test_a_key_that_has_ended_opens_nothing_from_memory(
    served: Served, away: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = served.run(served.store.create_key("alice", scopes=["jobs:read"], expires_in=timedelta(hours=1)))
    with Client(base_url=served.url, api_key=key) as client:
        assert not client.describe().degraded
        with away():
            assert client.describe().degraded
            monkeypatch.setattr(served.store, "_now", lambda: clock.now() + timedelta(hours=1))
            assert refused(client.describe) == "STORE_UNREACHABLE"


def test_devices_in_quarantine_are_named_as_they_were_last_known(
    client: Client, served: Served, away: Any
) -> None:
    served.run(served.store.devices.quarantine("garage", "FRAME_CHECKSUM", "damaged"))
    assert client.describe().quarantined_devices == ("garage",)
    with away():
        assert client.describe().quarantined_devices == ("garage",)
        assert client.describe().degraded


def test_a_watch_waits_the_outage_out_and_misses_nothing(
    handle: JobHandle,
    served: Served,
    away: Any,
    asked: threading.Semaphore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cola_runtime.server.service.OUTAGE_PAUSE_SECONDS", 0.01)
    seen: list[int] = []

    def follow() -> None:
        """One call: the SDK would make another, if the service ended it."""
        request = jobs_pb2.WatchEventsRequest(job_id=handle.job_id, follow=True)
        with grpc.insecure_channel(served.target) as channel:
            key = [("authorization", f"Bearer {served.keys['alice']}")]
            events = jobs_pb2_grpc.JobsStub(channel).WatchEvents(request, metadata=key, timeout=30)
            seen.extend(event.id for event in events)

    watch = threading.Thread(target=follow)
    with away():
        watch.start()
        assert all(asked.acquire(timeout=10) for _ in range(10)), "it does not ask again"
        assert watch.is_alive()
    served.train(handle.job_id, steps=3, succeed=True)
    watch.join(10)
    assert seen == [event.id for event in served.run(served.store.events(handle.job_id))]


def test_a_database_that_does_not_answer_is_away_too(
    client: Client, handle: JobHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall, "READ_SECONDS", 0.05)
    transact, silence = Database._transact, threading.Event()

    def late(database: Database, *arguments: Any) -> Any:
        silence.wait(10)
        return transact(database, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Database, "_transact", late)
        assert handle.refresh().stale
        assert client.describe().degraded
        silence.set()
    monkeypatch.setattr(recall, "SILENT_READ_SECONDS", 5.0)
    assert not handle.refresh().stale
    assert client.describe().degraded == ""


def test_pages_of_what_is_remembered_are_newest_first(
    client: Client, spec: JobSpec, served: Served, away: Any
) -> None:
    first, second = [client.submit(spec, training=ROWS).job_id for _ in range(2)]
    alice = served.tenants["alice"]
    with away():
        pages = [
            served.run(served.service.jobs(alice, limit=1, after=after)) for after in ("", second, first)
        ]
    assert [[job.job_id for job in page] for page in pages] == [[second], [first], []]


def test_memory_holds_no_more_than_it_may() -> None:
    newest = recall.Newest[int](2)
    for name, value in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
        newest.note(name, value)
    assert dict(newest.values) == {"a": 3, "c": 4}


def test_doctor_notes_that_a_service_is_degraded(
    client: Client, served: Served, away: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.describe()
    monkeypatch.setenv("COLA_API_KEY", served.keys["alice"])
    with away():
        found = checks.check_key(client_settings(base_url=served.url))
    assert (found.status, "degraded: STORE_UNREACHABLE" in found.finding) == ("note", True)


def test_a_job_store_that_is_damaged_under_the_service_is_told_by_every_call(
    client: Client, handle: JobHandle, spec: JobSpec, served: Served
) -> None:
    served.run(served.store._database.run(lambda c: c.exec_driver_sql("PRAGMA cache_size = 1")))
    folder = served.objects.parent
    for name, kept_bytes in (("jobs.sqlite", 2 * 4096), ("jobs.sqlite-wal", 32)):
        file_bytes = (folder / name).stat().st_size
        with (folder / name).open("r+b") as file:
            file.seek(kept_bytes)
            file.write(b"\xa5" * (file_bytes - kept_bytes))
    assert (refused(handle.metrics), refused(handle.cancel)) == ("STORE_CORRUPT", "STORE_CORRUPT")
    assert refused(lambda: client.submit(spec, training=ROWS)) == "STORE_CORRUPT"
    job = handle.refresh()
    assert (job.state, job.version, job.stale) == ("running", 2, True)
    assert client.describe().degraded.startswith("STORE_CORRUPT")
    assert served.stored_files() == [f"datasets/{handle.job_id}/training.jsonl"]
