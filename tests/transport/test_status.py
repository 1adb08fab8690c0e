"""Errors cross gRPC unchanged, and nothing internal does."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import NoReturn

import grpc
import pytest

from cola_runtime import errors
from cola_runtime.errors import ColaError, InvalidInput, Violation
from cola_runtime.transport import status
from cola_runtime.transport.status import MAX_STATUS_BYTES, abort_with, error_from_rpc, status_of


class Raising:
    """A real server whose only method raises what it is given."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    async def call(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        await abort_with(context, self._error)

    async def start(self) -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        handler = grpc.unary_unary_rpc_method_handler(self.call)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", {"C": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port


async def received(error: BaseException) -> ColaError:
    server, port = await Raising(error).start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/t.T/C")(b"", timeout=10)
    finally:
        await server.stop(0)
    return error_from_rpc(caught.value)


TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ColaError)]


@pytest.mark.parametrize("kind", [kind for kind in TREE if kind is not ColaError])
async def test_every_error_arrives_as_itself(kind: type[ColaError]) -> None:
    sent = kind(
        "REASON_X", "what happened", where="job.adapter.rank", limit=256, actual=0, remedy="Lower it."
    )
    back = await received(sent)
    assert type(back) is kind
    assert back.as_dict() == sent.as_dict()


async def test_violations_arrive_with_their_places() -> None:
    violations = tuple(Violation(where=f"train.jsonl:{line}:1", message="not JSON") for line in range(20))
    back = await received(InvalidInput("DATASET_INVALID", "20 lines", violations=violations))
    assert back.violations == violations


async def test_a_flood_of_violations_is_cut_to_what_grpc_lets_through() -> None:
    violations = tuple(Violation(where=f"x:{n}", message="y" * 400) for n in range(500))
    error = InvalidInput("DATASET_INVALID", "z" * 50_000, violations=violations)
    assert status_of(error).ByteSize() <= MAX_STATUS_BYTES + 200
    back = await received(error)
    assert back.reason == "DATASET_INVALID"
    assert 5 <= len(back.violations) < 500


async def test_an_unknown_exception_is_opaque(caplog: pytest.LogCaptureFixture) -> None:
    back = await received(RuntimeError("password is hunter2"))
    assert back.reason == "INTERNAL"
    assert "hunter2" not in str(back.as_dict())
    request_id = back.message.split("request id ")[1].rstrip(")")
    assert request_id in caplog.text
    assert "hunter2" in caplog.text


async def test_a_status_that_is_not_ours_becomes_the_nearest_error() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/t.T/C")(b"", timeout=5)
    back = error_from_rpc(caught.value)
    assert isinstance(back, errors.Unavailable)
    assert back.retryable


def test_a_call_whose_status_grpc_overwrote_may_be_made_again() -> None:
    """As grpcio's asyncio client reports a write that met the end of its call."""
    nothing = grpc.aio.Metadata()
    overwritten = grpc.aio.AioRpcError(
        grpc.StatusCode.INTERNAL, nothing, nothing, details="Internal error from Core"
    )
    back = error_from_rpc(overwritten)
    assert (back.reason, back.retryable) == ("STREAM_LOST", True)


def test_a_synchronous_client_reads_errors_too() -> None:
    with grpc.insecure_channel("127.0.0.1:1") as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/t.T/C")(b"", timeout=5)
    assert isinstance(error_from_rpc(caught.value), errors.Unavailable)


@pytest.mark.parametrize(
    "module", ["transport.status", "transport.stream", "transport.endpoints", "adapters.checkpoint_format"]
)
def test_the_coordinators_side_imports_neither_torch_nor_ray(module: str) -> None:
    program = f"import sys, cola_runtime.{module}; print([n for n in ('torch', 'ray') if n in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.strip() == "[]"


async def test_a_call_whose_peer_takes_no_status_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        async def abort_with_status(self, _status: object) -> NoReturn:
            await asyncio.get_running_loop().create_future()
            raise AssertionError("nobody ends it")

    monkeypatch.setattr(status, "ABORT_SECONDS", 0.01)
    with pytest.raises(asyncio.CancelledError):
        await status.abort_with(Gone(), InvalidInput("REQUEST_INVALID", "whatever it is"))
