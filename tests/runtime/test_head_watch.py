"""The coordinator notices that Ray's head is gone, and leaves with a reason."""

from __future__ import annotations

import asyncio

import pytest

from cola_runtime.cli.serve import leave
from cola_runtime.config import ServiceSettings
from cola_runtime.errors import Unavailable
from cola_runtime.runtime import head_watch
from cola_runtime.runtime.cluster import Cluster
from cola_runtime.runtime.head_watch import head_lost, require_head


async def listening() -> tuple[asyncio.Server, str]:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    return server, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_head_that_answers_is_not_lost_and_one_that_does_not_is() -> None:
    server, address = await listening()
    watching = asyncio.create_task(head_lost(address, after_seconds=0.0, identify=str))
    await asyncio.sleep(0.3)
    assert not watching.done()
    server.close()
    await server.wait_closed()
    lost = await watching
    assert (lost.reason, lost.exit_code) == ("RAY_LOST", 9)
    assert address in str(lost)


@pytest.mark.parametrize("keeps_its_state", [True, False])
async def test_a_head_that_comes_back_in_time_is_lost_only_without_its_state(
    keeps_its_state: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_watch, "LOOK_SECONDS", 0.02)
    server, address = await listening()
    clusters = ["first", "first" if keeps_its_state else "second"]
    watching = asyncio.create_task(head_lost(address, after_seconds=60.0, identify=lambda _: clusters.pop(0)))
    await asyncio.sleep(0.2)
    server.close()
    await server.wait_closed()
    await asyncio.sleep(0.2)
    host, _, port = address.rpartition(":")
    async with await asyncio.start_server(lambda _, writer: writer.close(), host, int(port)):
        done, _ = await asyncio.wait([watching], timeout=0.5)
        assert bool(done) is not keeps_its_state
        assert not clusters, "it was not asked who it is"
    watching.cancel()


async def test_a_start_without_a_head_says_so_at_once() -> None:
    server, address = await listening()
    require_head(address)
    require_head("auto")  # Ray's own search
    server.close()
    await server.wait_closed()
    with pytest.raises(Unavailable) as caught, Cluster(ServiceSettings(ray_address=address)):
        pass
    assert caught.value.reason == "RAY_LOST"
    assert address in str(caught.value)


def test_leaving_says_the_reason_and_ends_with_its_code(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    codes = []
    monkeypatch.setattr("os._exit", codes.append)
    leave(Unavailable("RAY_LOST", "nobody answers"), as_json=False)
    assert codes == [9]
    assert "RAY_LOST" in capfd.readouterr().err
