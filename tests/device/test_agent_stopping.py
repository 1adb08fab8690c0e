"""How a device that is told to stop gets out of whatever it is at."""

from __future__ import annotations

import asyncio

import pytest

from cola_runtime.device import agent as agents
from cola_runtime.device.agent import DeviceAgent
from cola_runtime.device.config import DeviceConfig
from cola_runtime.errors import Unavailable


async def test_a_call_that_fails_of_the_cancellation_does_not_keep_a_device_from_stopping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """gRPC may tell of a cancelled call by an error of its own; the device would go on with the next one."""
    device = DeviceAgent(
        DeviceConfig(device_id="garage", coordinator_endpoint="127.0.0.1:1", join_token="join")
    )
    joining = asyncio.Event()
    failed: list[str] = []

    async def attach(*_: object) -> None:
        joining.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if not failed:
                failed.append("once")
                raise Unavailable("UNREACHABLE", "the call was cancelled") from None
            raise

    monkeypatch.setattr(device, "_attach_once", attach)
    monkeypatch.setattr(agents, "CANCEL_AGAIN_SECONDS", 0.05)
    running = asyncio.create_task(device.run())
    await joining.wait()
    device.stop()
    ended, _ = await asyncio.wait((running,), timeout=5)  # which cancels nothing
    assert failed
    assert ended
