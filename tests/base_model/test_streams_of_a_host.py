"""One host fills its own share of a base model's port, and no other's: real streams from real addresses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cola_runtime.base_model.gradient_server import GradientServer
from cola_runtime.config import BaseModelSettings, HostSettings
from cola_runtime.device.config import DeviceConfig
from cola_runtime.device.enrolment import Dial
from cola_runtime.device.gradient_link import GradientLink
from cola_runtime.errors import QuotaExceeded
from cola_runtime.runtime.actors import BaseModelActor
from cola_runtime.testing.exactness import service_for
from cola_runtime.testing.in_process import JOIN_TOKEN, running_replica
from cola_runtime.testing.tiny_models import save_tiny_model
from cola_runtime.transport.endpoints import GRADIENTS, connect
from cola_runtime.transport.handshake import gradient_ticket
from cola_runtime.types import DeviceLinkChanged
from tests.addresses import relay_from

STREAMS, UNKNOWN = 8, 2
SECONDS = 10.0


class Port:
    """A base model's port with small limits, and the devices that dial it."""

    def __init__(self) -> None:
        self.connected: set[str] = set()
        self.endpoint = ""
        self.server = GradientServer(join_token=JOIN_TOKEN, on_update=lambda _: None, on_event=self._note)
        self._changed = asyncio.Event()

    def _note(self, event: object) -> None:
        assert isinstance(event, DeviceLinkChanged)
        (self.connected.add if event.connected else self.connected.discard)(event.device_id)
        self._changed.set()

    async def until_gone(self, device_id: str) -> None:
        async with asyncio.timeout(SECONDS):
            while device_id in self.connected:
                self._changed.clear()
                await self._changed.wait()


async def attach(endpoint: str, device_id: str) -> GradientLink:
    config = DeviceConfig(device_id=device_id, coordinator_endpoint="", join_token="")
    ticket = gradient_ticket(JOIN_TOKEN, device_id)
    return await GradientLink.attach(Dial(endpoint=endpoint, credentials=None), config, ticket=ticket)


async def refusal(endpoint: str, device_id: str) -> QuotaExceeded:
    """As soon as the port has noticed who else is there."""
    async with asyncio.timeout(SECONDS):
        while True:
            try:
                link = await attach(endpoint, device_id)
            except QuotaExceeded as error:
                return error
            await link.close()


@pytest.fixture
async def port() -> AsyncIterator[Port]:
    port = Port()
    limits = HostSettings(calls=STREAMS, unknown_calls=UNKNOWN)
    port.endpoint = await port.server.start("127.0.0.1:0", hosts=limits)
    yield port
    await port.server.stop()


async def test_a_host_that_fills_its_share_of_streams_leaves_other_hosts_theirs(port: Port) -> None:
    links = [await attach(port.endpoint, f"d{number}") for number in range(STREAMS)]
    error = await refusal(port.endpoint, "one-more")
    assert (error.reason, error.limit, error.actual) == ("TOO_MANY_CALLS", str(STREAMS), str(STREAMS))
    assert "host 127.0.0.1 " in error.message

    relay = await relay_from("127.0.0.2", int(port.endpoint.rpartition(":")[2]))
    elsewhere = await attach(f"127.0.0.1:{relay.sockets[0].getsockname()[1]}", "elsewhere")
    assert port.connected == {*(f"d{number}" for number in range(STREAMS)), "elsewhere"}

    await links.pop().close()
    await port.until_gone(f"d{STREAMS - 1}")
    links.append(await attach(port.endpoint, "one-more"))
    for link in (*links, elsewhere):
        await link.close()
    relay.close()


async def test_streams_without_a_ticket_leave_room_for_devices_that_show_one(port: Port) -> None:
    inside = await attach(port.endpoint, "inside")
    async with strangers(port.endpoint, UNKNOWN):
        error = await refusal(port.endpoint, "late")
        assert (error.limit, "whose they are" in error.message) == (str(UNKNOWN), True)
    await inside.close()


@asynccontextmanager
async def strangers(endpoint: str, count: int) -> AsyncIterator[None]:
    """So many streams without a hello."""
    opened = [await connect(endpoint, GRADIENTS) for _ in range(count)]
    yield
    for each in opened:
        await each.close()


async def test_a_base_model_has_the_limits_of_the_services_settings(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    settings = service_for(tmp_path, model=model, name="tiny", dtype="float32")
    settings = settings.model_copy(update={"hosts": HostSettings(calls=1)})
    async with running_replica(settings, settings.base_models[0]) as base:
        endpoint = (await base.describe()).gradient_endpoint
        await _takes_one_stream(endpoint)


async def test_a_base_models_actor_has_the_limits_that_it_is_made_with(tmp_path: Path) -> None:
    settings = BaseModelSettings(
        name="tiny", path=save_tiny_model("gpt2", tmp_path / "model"), dtype="float32"
    )
    actor = BaseModelActor(settings, tmp_path / "cache", JOIN_TOKEN, (), hosts=HostSettings(calls=1))
    try:
        await _takes_one_stream((await actor.describe()).gradient_endpoint)
    finally:
        await actor._service.stop()


async def _takes_one_stream(endpoint: str) -> None:
    first = await attach(endpoint, "first")
    assert (await refusal(endpoint, "second")).limit == "1"
    await first.close()
