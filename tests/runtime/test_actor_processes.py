"""What the processes of base models and devices begin with."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cola_runtime.base_model.compute_lane import ComputeLane
from cola_runtime.device.agent import DeviceAgent
from cola_runtime.device.config import DeviceConfig
from cola_runtime.machine import COMPUTE_NICENESS, keep_started_objects
from cola_runtime.process_environment import LARGE_PAGES, TLS_ENVIRONMENT, WORKER_NICENESS, actor_environment


def test_an_actor_asks_for_large_pages_and_its_share_of_cores_unless_the_service_was_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1", WORKER_NICENESS: "15"}
    for name in told:
        monkeypatch.delenv(name, raising=False)
    assert actor_environment() == {**TLS_ENVIRONMENT, "GLIBC_TUNABLES": LARGE_PAGES, WORKER_NICENESS: "0"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert actor_environment() == {**TLS_ENVIRONMENT, **told}


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has a niceness of its own on Linux only")
async def test_what_computes_comes_behind_the_streams_of_its_process() -> None:
    ours = _niceness()
    lane = ComputeLane()
    try:
        assert await lane.run(_niceness) == min(ours + COMPUTE_NICENESS, 19)
    finally:
        lane.stop()
    device = DeviceAgent(
        DeviceConfig(device_id="device", coordinator_endpoint="127.0.0.1:1", join_token="join")
    )
    computing = asyncio.get_running_loop().run_in_executor(_thread_of(device), _niceness)
    assert await computing == min(ours + COMPUTE_NICENESS, 19)
    assert _niceness() == ours
    _thread_of(device).shutdown()


def _niceness() -> int:
    """Of the thread that asks."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def _thread_of(device: DeviceAgent) -> ThreadPoolExecutor:
    return device._thread


def test_what_a_process_started_with_is_not_collected_again() -> None:
    kept = [[] for _ in range(1000)]
    try:
        keep_started_objects()
        assert gc.get_freeze_count() > len(kept)
        assert not any(each is kept[0] for each in gc.get_objects())
    finally:
        gc.unfreeze()
