"""Over the wire: checkpoints that are pinned, keys that end, clients that are too old."""

from __future__ import annotations

from datetime import timedelta

import pytest
from serving import ROWS, Served

from cola_runtime import clock
from cola_runtime.client.sdk import Client
from cola_runtime.errors import Conflict, InvalidInput, NotFound, Unauthenticated
from cola_runtime.spec import JobSpec


def test_a_tenant_pins_and_unpins_its_checkpoints(client: Client, served: Served, spec: JobSpec) -> None:
    handle = client.submit(spec, training=ROWS)
    for _ in range(2):
        served.train(handle.job_id, steps=1)
        served.checkpoint(handle.job_id)
    assert (handle.pin().version, handle.pin(1).pinned) == (2, True)
    assert [each.pinned for each in handle.checkpoints()] == [True, True]
    assert not handle.unpin(1).pinned
    assert served.runner.retired == [handle.job_id], "what retention says of it is done at once"
    with pytest.raises(NotFound) as unknown:
        handle.pin(7)
    assert unknown.value.reason == "CHECKPOINT_UNKNOWN"
    told = [each.kind for each in served.run(served.store.audit.entries(limit=100))]
    assert told.count("checkpoint.pinned") == 2
    assert told.count("checkpoint.unpinned") == 1


def test_a_key_may_have_an_end(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with Client(base_url=served.url, api_key=served.keys["alice"]) as operator:
        short = operator.create_key("bob", expires_in_seconds=3600)
        with Client(base_url=served.url, api_key=short.key) as client:
            assert client.jobs() == []
            keys = operator.keys()
            (listed,) = [each for each in keys if each.expires_at]
            assert listed.tenant == "bob"
            monkeypatch.setattr(served.store, "_now", lambda: clock.now() + timedelta(minutes=30))
            assert client.jobs() == []
            monkeypatch.setattr(served.store, "_now", lambda: clock.now() + timedelta(hours=1))
            with pytest.raises(Unauthenticated) as ended:
                client.jobs()
        assert (ended.value.reason, "expired" in ended.value.message) == ("KEY_UNKNOWN", True)
        with pytest.raises(InvalidInput) as long:
            operator.create_key("bob", expires_in_seconds=10**12)
        assert long.value.reason == "KEY_LIFE"


@pytest.mark.parametrize(
    ("version", "served_well"), [("0.0.9", False), ("none", False), ("0.1.0", True), ("9.0", True)]
)
def test_a_client_of_a_release_that_is_too_old_is_told_so(
    served: Served, monkeypatch: pytest.MonkeyPatch, version: str, served_well: bool
) -> None:
    monkeypatch.setattr("cola_runtime.__version__", version)
    with Client(base_url=served.url, api_key=served.keys["alice"]) as client:
        if served_well:
            assert client.jobs() == []
            return
        with pytest.raises(Conflict) as refused:
            client.jobs()
    assert (refused.value.reason, refused.value.actual) == ("SDK_TOO_OLD", version)
    assert "pip install --upgrade" in refused.value.remedy
