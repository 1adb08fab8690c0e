"""While the database is away devices are let in as they were before, and nobody else is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from datetime import timedelta

import pytest
from job_samples import HandClock

from cola_runtime.errors import ColaError, Unavailable
from cola_runtime.job_choices import TrustClass
from cola_runtime.jobs import device_recall
from cola_runtime.jobs.device_recall import DeviceRecall
from cola_runtime.jobs.store import JobStore
from cola_runtime.proto import control_pb2
from cola_runtime.scheduler.device_gate import Admission, DeviceGate
from cola_runtime.scheduler.patience import until_available
from cola_runtime.transport.certificates import Authority, certificate_request, new_key
from cola_runtime.transport.certificates import requested_key_sha256 as key_of
from tests.outages import database_away
from tests.postgres import PostgresServer

Away = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Away:
    return lambda: database_away(monkeypatch)


@pytest.fixture
def gate(store: JobStore) -> DeviceGate:
    return DeviceGate(store.devices, join_token="own")


async def refused(attempt: Awaitable[object]) -> str:
    with pytest.raises(ColaError) as caught:
        await attempt
    return caught.value.reason


class Device:
    """One device with a certificate, as the gate sees it; and its join token."""

    def __init__(self, device_id: str, token: str, authority: Authority) -> None:
        self.device_id, self.token = device_id, token
        self.request = certificate_request(new_key())
        self.certificate = authority.device(device_id, self.request, lifetime=timedelta(days=3000))

    async def dial(self, gate: DeviceGate, *, token: str = "") -> Admission:
        """By certificate, or where a token is given, by that."""
        hello = control_pb2.DeviceHello(device_id=self.device_id, join_token=token)
        return await gate.admit(hello, None if token else self.certificate)


@pytest.fixture
async def garage(store: JobStore, hand_clock: HandClock) -> Device:
    """A community device that has joined."""
    token, _ = await store.devices.create_token(
        TrustClass.COMMUNITY, reusable=True, valid=timedelta(days=1), created_by="key-1"
    )
    device = Device("garage", token, Authority.create())
    until = hand_clock() + timedelta(days=30)
    await store.devices.join(token, "garage", key_of(device.request), until=until)
    return device


async def test_a_device_comes_back_with_the_trust_class_that_it_had(
    gate: DeviceGate, garage: Device, away: Away
) -> None:
    admitted = [await garage.dial(gate), await garage.dial(gate, token=garage.token)]
    own = await garage.dial(gate, token="own")
    with away():
        again = [await garage.dial(gate), await garage.dial(gate, token=garage.token)]
        assert again == admitted
        assert {each.trust for each in again} == {TrustClass.COMMUNITY}
        assert await garage.dial(gate, token="own") == own
    assert await garage.dial(gate) == admitted[0]


async def test_who_was_not_let_in_before_hears_of_the_outage(
    gate: DeviceGate, garage: Device, store: JobStore, away: Away
) -> None:
    stranger = Device("stranger", garage.token, Authority.create())
    await garage.dial(gate, token="own")
    with away():
        assert await refused(stranger.dial(gate)) == "STORE_UNREACHABLE"
        assert await refused(stranger.dial(gate, token=garage.token)) == "STORE_UNREACHABLE"
        assert await refused(stranger.dial(gate, token="own")) == "STORE_UNREACHABLE"
        assert await refused(garage.dial(gate, token="another")) == "STORE_UNREACHABLE"
        assert await refused(garage.dial(gate, token=garage.token)) == "STORE_UNREACHABLE", (
            "not with this one"
        )
        posing = Device("garage", "", Authority.create())
        assert await refused(posing.dial(gate)) == "DEVICE_UNKNOWN", "the id is another key's"
    assert await refused(stranger.dial(gate)) == "DEVICE_UNKNOWN"


async def test_who_was_revoked_stays_out_also_if_the_store_could_not_hear_of_it(
    gate: DeviceGate, garage: Device, store: JobStore, away: Away
) -> None:
    await garage.dial(gate)
    with away():
        assert await refused(store.devices.revoke("garage")) == "STORE_UNREACHABLE"
        assert await refused(garage.dial(gate)) == "STORE_UNREACHABLE"
    await garage.dial(gate)
    await store.devices.revoke("garage")
    with away():
        assert await refused(garage.dial(gate)) == "DEVICE_REVOKED"


@pytest.mark.parametrize("heard", [True, False])
async def test_who_is_in_quarantine_stays_out_until_it_is_reinstated(
    gate: DeviceGate, garage: Device, store: JobStore, away: Away, heard: bool
) -> None:
    await garage.dial(gate)
    if heard:
        await store.devices.quarantine("garage", "SPOT_CHECK_FAILED", "it lied")
    with away():
        if not heard:
            put_out = store.devices.quarantine("garage", "SPOT_CHECK_FAILED", "it lied")
            assert await refused(put_out) == "STORE_UNREACHABLE"
        assert await refused(garage.dial(gate)) == "DEVICE_QUARANTINED"
        assert await refused(garage.dial(gate, token="own")) == "DEVICE_QUARANTINED"
        assert await refused(store.devices.reinstate("garage")) == "STORE_UNREACHABLE"
        assert await refused(garage.dial(gate)) == "DEVICE_QUARANTINED"
    if heard:
        await store.devices.reinstate("garage")
        with away():
            await garage.dial(gate)


async def test_what_has_ended_meanwhile_lets_nobody_in(
    gate: DeviceGate, garage: Device, hand_clock: HandClock, away: Away
) -> None:
    await garage.dial(gate)
    await garage.dial(gate, token=garage.token)
    with away():
        hand_clock.forward(seconds=timedelta(days=1).total_seconds())
        assert await refused(garage.dial(gate, token=garage.token)) == "JOIN_TOKEN_WRONG"
        await garage.dial(gate)
        hand_clock.forward(seconds=timedelta(days=29).total_seconds())
        assert await refused(garage.dial(gate)) == "DEVICE_UNKNOWN"


async def test_what_of_a_device_is_forgotten_is_asked_of_the_store(
    garage: Device, store: JobStore, away: Away, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_recall, "MOST_DEVICES", 1)
    memory = device_recall.DeviceMemory(store._now)
    monkeypatch.setattr(store.devices, "memory", memory)
    recall = DeviceRecall(store.devices)
    await recall.admitted("garage", key_of(garage.request))
    await recall.check_not_quarantined("garage")
    await recall.check_not_quarantined("another")
    with away():
        await recall.admitted("garage", key_of(garage.request))
        with pytest.raises(Unavailable):
            await recall.check_not_quarantined("garage")


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
async def test_a_device_comes_back_while_the_server_is_down(
    gate: DeviceGate, garage: Device, postgres: PostgresServer
) -> None:
    admitted = await garage.dial(gate)
    stranger = Device("stranger", garage.token, Authority.create())
    postgres.stop("immediate")
    try:
        assert await garage.dial(gate) == admitted
        assert await refused(stranger.dial(gate, token=garage.token)) == "STORE_UNREACHABLE"
    finally:
        postgres.start()
    again = await until_available(lambda: stranger.dial(gate, token=garage.token))
    assert again.trust is TrustClass.COMMUNITY
