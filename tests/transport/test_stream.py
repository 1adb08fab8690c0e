"""Frame streams over real gRPC on loopback: order, back-pressure, ends and refusals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import torch

from cola_runtime.errors import ColaError, Fenced, InvalidInput, ProtocolError, Unauthenticated, Unavailable
from cola_runtime.proto import control_pb2
from cola_runtime.transport.endpoints import GRADIENTS, STREAM_OPTIONS, Connection, connect, serve_streams
from cola_runtime.transport.frames import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, TensorAddress, tensor_frames
from cola_runtime.transport.handshake import check_ticket, gradient_ticket, introduce, receive_hello
from cola_runtime.transport.reader import FrameLimits, ReceivedTensor
from cola_runtime.transport.stream import SEND_QUEUE_BYTES, FrameStream, ReceivedControl
from cola_runtime.transport.tensors import from_wire, to_wire
from cola_runtime.types import TensorKind

JOB = "job-" + "ab" * 16
OnStream = Callable[[FrameStream[Any]], Coroutine[Any, Any, None]]


def address(site: int) -> TensorAddress:
    return TensorAddress(job_id=JOB, epoch=1, version=0, site=site, kind=TensorKind.LORA_A)


def credit(number: int) -> control_pb2.GradientControl:
    return control_pb2.GradientControl(credit=control_pb2.Credit(bytes=number))


def hello(**changes: Any) -> control_pb2.GradientControl:
    ticket = gradient_ticket("secret", "d1")
    fields = {"device_id": "d1", "ticket": ticket, "protocol_version": PROTOCOL_VERSION, **changes}
    return control_pb2.GradientControl(hello=control_pb2.GradientHello(**fields))


@asynccontextmanager
async def serving(on_stream: OnStream) -> AsyncIterator[str]:
    server, endpoint = await serve_streams("127.0.0.1:0", {GRADIENTS: on_stream})
    try:
        yield endpoint
    finally:
        await server.stop(0)


@asynccontextmanager
async def connected(on_stream: OnStream) -> AsyncIterator[Connection[Any]]:
    async with serving(on_stream) as endpoint:
        stream = await connect(endpoint, GRADIENTS)
        stream.accept_tensors(FrameLimits())
        try:
            yield stream
        finally:
            await stream.close()


async def echo(stream: FrameStream[Any]) -> None:
    stream.accept_tensors(FrameLimits())
    async for item in stream:
        if isinstance(item, ReceivedTensor):
            await stream.send_tensor(item.address, to_wire(from_wire(item)))
        else:
            await stream.send_control(item.message)


async def take(stream: FrameStream[Any], count: int) -> list[Any]:
    items: list[Any] = []
    while len(items) < count:
        items += await stream.receive(timeout_seconds=20)
    return items


async def test_tensors_and_control_messages_keep_their_order_both_ways() -> None:
    tensors = [
        torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (1, 300_000, 70, 1_400_000)
    ]
    async with connected(echo) as stream:
        sending = asyncio.create_task(_send_alternating(stream, tensors))
        items = await take(stream, 2 * len(tensors))
        await sending
    assert [item.message.credit.bytes for item in items[1::2]] == [0, 1, 2, 3]
    assert all(torch.equal(from_wire(item), sent) for item, sent in zip(items[::2], tensors, strict=True))
    assert stream.bytes_sent == stream.bytes_received == sum(item.wire_bytes for item in items)


async def _send_alternating(stream: FrameStream[Any], tensors: list[torch.Tensor]) -> None:
    for site, tensor in enumerate(tensors):
        await stream.send_tensor(address(site), to_wire(tensor))
        await stream.send_control(credit(site))


async def test_many_small_frames_travel_in_few_messages() -> None:
    messages = []

    async def count(stream: FrameStream[Any]) -> None:
        stream.accept_tensors(FrameLimits())
        while items := await stream.receive():
            messages.append(len(items))
            if sum(messages) == 420:
                await stream.send_control(credit(1))

    async with connected(count) as stream:
        for site in range(420):
            await stream.send_tensor(address(site), to_wire(torch.ones(8, 340)))
        await stream.receive(timeout_seconds=20)
    assert sum(messages) == 420
    assert len(messages) <= 8  # 4.6 MB


async def test_a_reader_that_stops_reading_bounds_the_senders_memory() -> None:
    release = asyncio.Event()

    async def silent(stream: FrameStream[Any]) -> None:
        await release.wait()

    tensor = torch.ones(1 << 18)
    async with connected(silent) as stream:
        sending = asyncio.create_task(_send_alternating(stream, [tensor] * 200))
        await asyncio.wait([sending], timeout=1.0)
        assert not sending.done()
        assert stream.queued_bytes <= SEND_QUEUE_BYTES + (2 << 20)
        assert stream.bytes_sent < 40 << 20
        sending.cancel()
        release.set()


async def test_a_sender_that_waits_goes_on_when_the_reader_reads() -> None:
    release = asyncio.Event()

    async def late(stream: FrameStream[Any]) -> None:
        stream.accept_tensors(FrameLimits())
        await release.wait()
        await take(stream, 40)
        await stream.send_control(credit(40))

    async with connected(late) as stream:
        sending = asyncio.create_task(_send_alternating(stream, [torch.ones(1 << 18)] * 20))
        await asyncio.sleep(0.2)
        assert not sending.done()
        release.set()
        (answer,) = await stream.receive(timeout_seconds=20)
        await sending
    assert answer.message.credit.bytes == 40  # type: ignore[union-attr]


async def test_the_peer_reads_what_was_sent_before_a_close() -> None:
    received: list[int] = []
    ended = asyncio.Event()

    async def collect(stream: FrameStream[Any]) -> None:
        async for item in stream:
            assert isinstance(item, ReceivedControl)
            received.append(item.message.credit.bytes)
        ended.set()

    async with serving(collect) as endpoint:
        stream = await connect(endpoint, GRADIENTS)
        for number in range(5):
            await stream.send_control(credit(number))
        await stream.close()
        await stream.close()
        async with asyncio.timeout(5):
            await ended.wait()
        with pytest.raises(Unavailable):
            await stream.send_control(credit(6))
    assert received == [0, 1, 2, 3, 4]


async def test_a_vanished_server_ends_reading_and_sending() -> None:
    server, endpoint = await serve_streams("127.0.0.1:0", {GRADIENTS: echo})
    stream = await connect(endpoint, GRADIENTS)
    await stream.send_control(credit(1))
    await stream.receive(timeout_seconds=5)
    await server.stop(0)
    with pytest.raises(Unavailable):
        await stream.receive(timeout_seconds=5)
    with pytest.raises(Unavailable):
        await asyncio.wait_for(_send_alternating(stream, [torch.ones(1 << 18)] * 100), 5)
    await stream.close()


async def test_the_servers_handler_is_cancelled_when_the_client_vanishes() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def hold(stream: FrameStream[Any]) -> None:
        begun.set()
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()

    async with serving(hold) as endpoint:
        channel = grpc.aio.insecure_channel(endpoint, options=STREAM_OPTIONS)
        call = channel.stream_stream(GRADIENTS.path)()
        await begun.wait()
        call.cancel()
        await channel.close()
        async with asyncio.timeout(5):
            await ended.wait()


async def test_a_stream_closed_at_the_servers_end_ends_at_the_peer() -> None:
    accepted: list[FrameStream[Any]] = []
    ended = asyncio.Event()

    async def listen(stream: FrameStream[Any]) -> None:
        accepted.append(stream)
        try:
            await echo(stream)
        finally:
            ended.set()

    async with connected(listen) as stream:
        await stream.send_control(credit(1))
        await stream.receive(timeout_seconds=5)
        await accepted[0].send_control(credit(2))
        await accepted[0].close()
        (last,) = await stream.receive(timeout_seconds=5)
        assert isinstance(last, ReceivedControl)
        assert await stream.receive(timeout_seconds=5) == []
        async with asyncio.timeout(5):
            await ended.wait()


async def test_connecting_to_nobody_fails_in_time() -> None:
    with pytest.raises(Unavailable) as caught:
        await connect("127.0.0.1:1", GRADIENTS, timeout_seconds=0.3)
    assert caught.value.reason == "ENDPOINT_UNREACHABLE"


async def test_what_a_handler_raises_reaches_the_peer_as_the_same_error() -> None:
    async def refuse(stream: FrameStream[Any]) -> None:
        raise Fenced("FENCED", "an older lease", limit=4, actual=3)

    async with connected(refuse) as stream:
        with pytest.raises(Fenced) as caught:
            await stream.receive(timeout_seconds=5)
    assert (caught.value.reason, caught.value.limit, caught.value.actual) == ("FENCED", "4", "3")


async def test_bytes_that_are_no_frames_end_the_stream_with_a_reason() -> None:
    async with serving(echo) as endpoint:
        channel = grpc.aio.insecure_channel(endpoint)
        call = channel.stream_stream(GRADIENTS.path)()
        await call.write(b"GET / HTTP/1.1\r\n" * 20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        await channel.close()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "COLA" in caught.value.details()


async def test_a_message_above_the_limit_is_refused_by_grpc_and_the_connections_other_stream_goes_on() -> (
    None
):
    async with serving(echo) as endpoint, grpc.aio.insecure_channel(endpoint) as channel:
        other: FrameStream[Any] = FrameStream(
            channel.stream_stream(GRADIENTS.path)(),  # type: ignore[arg-type]
            control_pb2.GradientControl,
            peer=endpoint,
        )
        await other.send_control(credit(1))
        await take(other, 1)
        call = channel.stream_stream(GRADIENTS.path)()
        await call.write(bytes(2 << 20))
        await other.send_control(credit(2))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        await other.send_control(credit(3))
        echoed = [item.message.credit.bytes for item in await take(other, 2)]
        await other.close()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"{2 << 20} vs. {MAX_MESSAGE_BYTES}" in caught.value.details()
    assert echoed == [2, 3]


async def _greeter(stream: FrameStream[Any]) -> None:
    async def check(hello: control_pb2.GradientHello) -> None:
        check_ticket("secret", hello, stream.certificate)

    await receive_hello(stream, check=check, limits=FrameLimits(), timeout_seconds=0.5)
    await stream.send_control(control_pb2.GradientControl(welcome=control_pb2.GradientWelcome()))
    await stream.send_tensor(address(0), to_wire(torch.ones(2)))
    await echo(stream)


async def test_a_welcome_may_be_followed_at_once_by_tensors() -> None:
    async with connected(_greeter) as stream:
        await introduce(stream, hello(), limits=FrameLimits())
        (item,) = await take(stream, 1)
    assert isinstance(item, ReceivedTensor)


@pytest.mark.parametrize(
    ("message", "kind", "reason"),
    [
        (hello(ticket="guess"), Unauthenticated, "TICKET_WRONG"),
        (hello(ticket="sécret.²"), Unauthenticated, "TICKET_WRONG"),
        (hello(device_id="d2"), Unauthenticated, "TICKET_WRONG"),
        (hello(ticket=gradient_ticket("another", "d1")), Unauthenticated, "TICKET_WRONG"),
        (hello(ticket=gradient_ticket("secret", "d1", now=0)), Unauthenticated, "TICKET_WRONG"),
        (hello(protocol_version=99), ProtocolError, "PROTOCOL_VERSION"),
        (hello(device_id="../x"), ProtocolError, "DEVICE_ID_INVALID"),
        (credit(1), ProtocolError, "HELLO_EXPECTED"),
    ],
)
async def test_a_wrong_hello_is_refused_with_its_reason(
    message: control_pb2.GradientControl, kind: type[ColaError], reason: str
) -> None:
    async with connected(_greeter) as stream:
        with pytest.raises(kind) as caught:
            await introduce(stream, message, limits=FrameLimits())
    assert caught.value.reason == reason


async def test_a_peer_that_begins_a_tensor_and_stops_is_dropped() -> None:
    async def on_stream(stream: FrameStream[Any]) -> None:
        stream.accept_tensors(FrameLimits(tensor_seconds=0.1))
        while await stream.receive():
            pass

    async with connected(on_stream) as stream:
        first, *_ = tensor_frames(address(0), to_wire(torch.zeros(1 << 20)))
        await stream._queue(first)
        with pytest.raises(ProtocolError) as caught:
            await stream.receive(timeout_seconds=5)
    assert caught.value.reason == "TENSOR_STALLED"


async def test_a_peer_that_says_nothing_is_dropped() -> None:
    async with connected(_greeter) as stream:
        with pytest.raises(Unavailable) as caught:
            await stream.receive(timeout_seconds=5)
    assert caught.value.reason == "STREAM_SILENT"


async def test_a_stranger_cannot_make_the_server_allocate_a_tensor() -> None:
    async with connected(_greeter) as stream:
        await stream.send_tensor(address(0), to_wire(torch.ones(2)))
        with pytest.raises(ProtocolError) as caught:
            await stream.receive(timeout_seconds=5)
    assert caught.value.reason == "TENSOR_TOO_LARGE"


async def test_an_unexpected_error_is_opaque_to_the_peer() -> None:
    async def broken(stream: FrameStream[Any]) -> None:
        raise RuntimeError("secret path /etc/x")

    async with connected(broken) as stream:
        with pytest.raises(ColaError) as caught:
            await stream.receive(timeout_seconds=5)
    assert not isinstance(caught.value, InvalidInput)
    assert caught.value.reason == "INTERNAL"
    assert "secret" not in str(caught.value)
    assert "request id" in caught.value.message
