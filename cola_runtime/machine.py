"""This machine: what figures were measured on, and how its memory is handed out."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import sys
import threading
from typing import Any

import psutil

RECORDED_PACKAGES = ("torch", "transformers", "peft", "ray", "grpcio")


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's mallopt
HEAPS = 2
ALIGNMENT_BYTES = 64
"""Of what matrix products read. On some processors (AMD, with MKL) their last bits depend on it."""
KEPT_BYTES = 256 << 20
KEPT_ACTIVATION_BYTES = 1 << 30
"""Of a base model's process: a base step's activations come and go with it."""
COMPUTE_NICENESS = 3
MAPPED_BYTES = 32 << 20  # the most that glibc allows


def keep_freed_memory(kept_bytes: int = KEPT_BYTES) -> None:
    """Let this process reuse what it frees, up to `kept_bytes`, instead of giving it back to the system.

    By default glibc unmaps buffers above 128 KiB and trims its heap: messages of 1 MiB then get fresh pages,
    which the kernel zeroes one by one, for a fifth of a stream's CPU. Without glibc nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        glibc = ctypes.CDLL(None)
        glibc.mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)
        glibc.mallopt(_M_TRIM_THRESHOLD, kept_bytes)


def share_heaps() -> None:
    """Let this process's threads allocate from `HEAPS` heaps together; before it has started any.

    By default glibc gives every thread a heap of its own, up to eight a core, and each keeps what its thread
    ever needed at once: with forty threads and messages of 100 KiB, memory grows for minutes while what is in
    use does not (docs/performance.md). Without glibc nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, HEAPS)


def keep_started_objects() -> None:
    """Tell the garbage collector that what is there now stays: the modules and a loaded model.

    Else it looks at all of it again from time to time, while every other thread waits: 0.2 s for the 400,000
    objects of a base model's process.
    """
    gc.collect()
    gc.freeze()


def yield_to_streams() -> None:
    """Let the calling thread's computing come behind this process's event loop when cores are short.

    What waits for a message, a heartbeat or a credit needs a core for a moment, and somebody else's time
    hangs on it. By so little that a busy process of somebody else leaves the thread a third of a core. Off
    Linux, where a thread has no niceness of its own, nothing happens.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + COMPUTE_NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, niceness)


def is_memory_refused(error: BaseException) -> bool:
    """A buffer was asked for that this machine, or its accelerator, does not give the process."""
    # torch's class for accelerators is not imported here, and its CPU allocator raises a RuntimeError.
    own_class = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or own_class or "DefaultCPUAllocator" in str(error)


def machine() -> dict[str, Any]:
    """Processor, usable cores and memory of this machine."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
