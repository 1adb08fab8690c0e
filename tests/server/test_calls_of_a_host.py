"""One host fills its own share of a port's calls, and no other's: real channels from real addresses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from serving import ROWS, Served

from cola_runtime.client.sdk import Client
from cola_runtime.config import HostSettings, ServiceSettings
from cola_runtime.errors import QuotaExceeded
from cola_runtime.proto import jobs_pb2, jobs_pb2_grpc
from cola_runtime.runtime.certified import open_doors
from cola_runtime.server.grpc_server import serve_jobs
from cola_runtime.spec import JobSpec
from cola_runtime.transport.endpoints import DEVICES
from cola_runtime.transport.handshake import receive_hello
from cola_runtime.transport.host_calls import HostCalls, host_of
from cola_runtime.transport.reader import FrameLimits
from cola_runtime.transport.status import error_from_rpc
from tests.addresses import relay_from

CALLS, UNKNOWN = 12, 5
ROUNDS, A_ROUND = 30, 50  # streams
SECONDS = 10.0
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)


class Port:
    """A port with small limits, and what its peers do there."""

    def __init__(self, served: Served, calls: HostCalls, number: int) -> None:
        self.served, self.calls, self.number = served, calls, number
        self._channels = ExitStack()
        self._calls: list[Any] = []  # one that nobody refers to is cancelled

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.number}"

    def channel(self) -> grpc.Channel:
        """Each with a connection of its own."""
        opened = grpc.insecure_channel(self.target, options=OWN_CONNECTION)
        return self._channels.enter_context(opened)

    def watch(self, job_id: str) -> Any:
        """A call that lasts as long as the job; returns when the first event has come."""
        metadata = [("authorization", f"Bearer {self.served.keys['alice']}")]
        request = jobs_pb2.WatchEventsRequest(job_id=job_id, follow=True)
        call = jobs_pb2_grpc.JobsStub(self.channel()).WatchEvents(request, metadata=metadata)
        next(call)
        self._calls.append(call)
        return call

    def close(self) -> None:
        self._channels.close()


@pytest.fixture
def port(served: Served) -> Iterator[Port]:
    with listening(served, HostSettings(calls=CALLS, unknown_calls=UNKNOWN)) as made:
        yield made


@contextmanager
def listening(served: Served, limits: HostSettings) -> Iterator[Port]:
    async def on_stream(stream: Any) -> None:
        async def check(_hello: object) -> None:
            """Whoever says hello may come in."""

        await receive_hello(stream, check=check, limits=FrameLimits(), timeout_seconds=SECONDS)
        await asyncio.get_running_loop().create_future()

    calls = HostCalls(limits)
    streams = {DEVICES: on_stream}
    server, number = served.run(serve_jobs(served.service, "127.0.0.1:0", streams=streams, hosts=calls))
    made = Port(served, calls, number)
    try:
        yield made
    finally:
        made.close()
        served.run(server.stop(None))
        port_is_free(made, 0)
        assert (dict(calls._calls), dict(calls._unknown)) == ({}, {}), "who has left is forgotten"


@contextmanager
def from_address(served: Served, address: str, port: int) -> Iterator[str]:
    """An endpoint whose connections come to the port from this address."""
    server = served.run(relay_from(address, port))
    try:
        yield f"grpc://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        served.loop.call_soon_threadsafe(server.close)


def refusal(call: Any) -> QuotaExceeded:
    with pytest.raises(grpc.RpcError) as ended:
        call()
    assert ended.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    error = error_from_rpc(ended.value)
    assert isinstance(error, QuotaExceeded)
    assert (error.reason, "try again" in error.remedy) == ("TOO_MANY_CALLS", True)
    return error


def test_a_host_that_fills_its_share_leaves_other_hosts_theirs(
    served: Served, port: Port, client: Client, spec: JobSpec
) -> None:
    job_id = client.submit(spec, training=ROWS).job_id
    watching = [port.watch(job_id) for _ in range(CALLS)]
    error = refusal(lambda: port.watch(job_id))
    assert (error.limit, error.actual) == (str(CALLS), str(CALLS))
    assert "host 127.0.0.1 " in error.message
    with (
        from_address(served, "127.0.0.2", port.number) as url,
        Client(base_url=url, api_key=served.keys["bob"]) as bob,
    ):
        assert bob.jobs() == []
    watching.pop().cancel()
    port_is_free(port, CALLS - 1)
    port.watch(job_id)


def port_is_free(port: Port, calls: int) -> None:
    """Wait until the server has noticed that a peer has gone."""

    port.served.run(until(lambda: port.calls._calls.total() <= calls))


async def until(condition: Callable[[], bool]) -> None:
    """Of a counter, which has no event."""
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_calls_that_do_not_say_whose_they_are_leave_room_for_those_that_do(
    served: Served, port: Port, client: Client, spec: JobSpec
) -> None:
    job_id = client.submit(spec, training=ROWS).job_id
    with strangers(served, port, UNKNOWN):
        error = refusal(lambda: port.watch(job_id))
        assert (error.limit, "whose they are" in error.message) == (str(UNKNOWN), True)
    port_is_free(port, 0)
    for _ in range(UNKNOWN + 1):
        port.watch(job_id)
    with strangers(served, port, UNKNOWN - 1):
        port.watch(job_id)


@contextmanager
def strangers(served: Served, port: Port, count: int) -> Iterator[None]:
    """So many device streams without a hello."""

    @asynccontextmanager
    async def streams() -> AsyncIterator[None]:
        channels = [grpc.aio.insecure_channel(port.target, options=OWN_CONNECTION) for _ in range(count)]
        calls = [channel.stream_stream(DEVICES.path)() for channel in channels]
        await asyncio.gather(*(call.wait_for_connection() for call in calls))
        await until(lambda: port.calls._unknown.total() >= count)
        yield
        for channel in channels:
            await channel.close()

    opened = streams()
    served.run(opened.__aenter__())
    yield
    served.run(opened.__aexit__(None, None, None))


def test_streams_that_are_reset_as_soon_as_they_are_served_use_up_nobodys_share(
    served: Served, port: Port, client: Client, spec: JobSpec
) -> None:
    """Rapid reset: each round's calls are counted, some refused, and all forgotten when they are reset.

    A handler that ended without giving its place back would shut its host out within a round.
    """
    job_id = client.submit(spec, training=ROWS).job_id

    async def flood() -> None:
        async with grpc.aio.insecure_channel(port.target, options=OWN_CONNECTION) as channel:
            for _ in range(ROUNDS):
                calls = [channel.stream_stream(DEVICES.path)() for _ in range(A_ROUND)]
                await until(lambda: port.calls._unknown.total() == UNKNOWN)
                for call in calls:
                    call.cancel()
                await until(lambda: port.calls._calls.total() == 0)

    served.run(flood())
    for _ in range(CALLS):
        port.watch(job_id)


def test_who_comes_through_a_proxy_that_is_named_has_no_cap_here(
    served: Served, client: Client, spec: JobSpec
) -> None:
    job_id = client.submit(spec, training=ROWS).job_id
    limits = HostSettings.model_validate({"calls": 1, "unknown_calls": 1, "proxies": ["127.0.0.1"]})
    with listening(served, limits) as port:
        for _ in range(3):
            port.watch(job_id)


def test_a_service_has_the_limits_of_its_settings(served: Served, client: Client, spec: JobSpec) -> None:
    job_id = client.submit(spec, training=ROWS).job_id
    settings = ServiceSettings.model_validate({"listen": "127.0.0.1:0", "hosts": {"calls": 2}})
    pool: Any = SimpleNamespace(on_stream=None)
    doors = served.run(open_doors(settings, served.service, pool))
    port = Port(served, HostCalls(HostSettings()), int(doors.endpoint.rpartition(":")[2]))
    for _ in range(2):
        port.watch(job_id)
    assert refusal(lambda: port.watch(job_id)).limit == "2"
    port.close()
    served.run(doors.close())


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:192.0.2.7:50000", "192.0.2.7"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:50000", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2::1]:50000", "2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:192.0.2.7%5D:50000", "192.0.2.7"),
        ("ipv6:%5Bfe80::1%25eth0%5D:50000", "fe80::/64"),
        ("ipv6:%5B::1%5D:50000", "::/64"),
        ("unix:", "unix:"),
    ],
)
def test_a_host_is_an_address_or_in_ipv6_its_network(peer: str, host: str) -> None:
    assert host_of(peer) == host
