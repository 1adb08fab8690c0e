"""What a process holds: memory, descriptors, tasks. They must come back after any abuse."""

from __future__ import annotations

import asyncio
import ctypes
import gc
from dataclasses import dataclass

import psutil

MIB = 1 << 20
GROWTH_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class Vitals:
    rss: int
    descriptors: int
    tasks: int


def vitals(loop: asyncio.AbstractEventLoop) -> Vitals:
    """What is in use: the allocator gives back what it keeps for later, as far as it can."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    process = psutil.Process()
    return Vitals(process.memory_info().rss, process.num_fds(), len(asyncio.all_tasks(loop)))


def check_came_back(before: Vitals, after: Vitals) -> None:
    assert after.rss - before.rss < GROWTH_BYTES, f"{(after.rss - before.rss) / MIB:.0f} MiB were kept"
    assert after.descriptors <= before.descriptors + 8, f"{before} -> {after}"
    assert after.tasks <= before.tasks + 4, f"{before} -> {after}"
