"""A device takes its own place at the gradient server only once the link that it left behind has ended."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from cola_runtime.base_model import gradient_server
from cola_runtime.base_model.gradient_server import GradientServer
from cola_runtime.errors import Unavailable


def link(*, ends: bool) -> Any:
    gone = asyncio.Event()
    return SimpleNamespace(device_id="d1", gone=gone, replace=gone.set if ends else lambda: None)


async def test_a_link_that_does_not_end_keeps_its_device_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_server, "REPLACE_SECONDS", 0.01)
    server = GradientServer(join_token="token", on_update=lambda _: None, on_event=lambda _: None)
    stuck = link(ends=False)
    await server._replace(stuck)
    with pytest.raises(Unavailable) as caught:
        await server._replace(link(ends=True))
    assert caught.value.reason == "DEVICE_ID_BUSY"
    assert server._links["d1"] is stuck
    stuck.replace = stuck.gone.set
    after = link(ends=True)
    await server._replace(after)
    assert server._links["d1"] is after
