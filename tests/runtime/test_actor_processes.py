"""What the processes of base models and devices begin with."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cola_runtime.base_model.compute_lane import ComputeLane
from cola_runtime.device.agent import DeviceAgent
from cola_runtime.device.config import DeviceConfig
from cola_runtime.machine import COMPUTE_NICENESS, keep_started_objects
from cola_runtime.process_environment import (
    JEMALLOC_SETTINGS,
    KEEP_LARGE,
    LARGE_PAGES,
    PRELOADED,
    TLS_ENVIRONMENT,
    WORKER_NICENESS,
    actor_environment,
    child_environment,
    jemalloc,
)


def test_an_actor_has_its_allocator_and_its_share_of_cores_unless_the_service_was_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = {
        PRELOADED: "libtcmalloc_minimal.so.4",
        JEMALLOC_SETTINGS: "narenas:2",
        "GLIBC_TUNABLES": "glibc.malloc.arena_max=1",
        WORKER_NICENESS: "15",
    }
    for name in told:
        monkeypatch.delenv(name, raising=False)
    ours = {
        PRELOADED: jemalloc(),
        JEMALLOC_SETTINGS: KEEP_LARGE,
        "GLIBC_TUNABLES": LARGE_PAGES,
        WORKER_NICENESS: "0",
    }
    assert actor_environment() == {**TLS_ENVIRONMENT, **ours}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert actor_environment() == {**TLS_ENVIRONMENT, **told}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux preloads it")
def test_what_an_actor_is_started_with_makes_torchs_tensors_by_jemalloc() -> None:
    """Its own count of bytes that threads were given grows by a tensor's."""
    source = (
        "import ctypes, torch\n"
        "counted, size = ctypes.c_uint64(), ctypes.c_size_t(8)\n"
        "def given():\n"
        "    count = ctypes.CDLL(None).mallctl\n"
        "    assert not count(b'thread.allocated', ctypes.byref(counted), ctypes.byref(size), None, 0)\n"
        "    return counted.value\n"
        "before = given()\n"
        "kept = torch.empty(1 << 20, dtype=torch.uint8)\n"
        "print(given() - before >= 1 << 20)\n"
    )
    assert _said_by_an_actor(source) == "True"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux preloads it")
def test_an_actor_takes_the_pages_of_a_freed_adapter_again_and_not_fresh_ones() -> None:
    """In any thread but the main one, where jemalloc 5.3 gives them back whatever it is told."""
    source = (
        "import resource, torch\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(16 << 20, dtype=torch.uint8)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "with ThreadPoolExecutor(1) as other:\n"
        "    print([other.submit(faults).result() >= 4096 for _ in range(4)])\n"
    )
    assert _said_by_an_actor(source) == "[True, False, False, False]"


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


def _said_by_an_actor(source: str) -> str:
    """What Python prints in a process with an actor's environment."""
    environment = child_environment(**actor_environment())
    told = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    return told.stdout.strip()
