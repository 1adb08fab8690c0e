"""What the demo ran on: processor, memory, versions, and the peak memory of all its processes."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Iterable
from importlib.metadata import version
from types import TracebackType

import psutil

GIB = 1 << 30
PACKAGES = ("torch", "transformers", "ray", "grpcio", "peft")
SAMPLE_SECONDS = 1.0


class MemoryWatch:
    """Samples the proportional set size of this process and everything below it; a context manager.

    Shared pages are divided among those that map them (PSS), so that the sum is what the machine gives up.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, _total_bytes([me, *me.children(recursive=True)]))


def machine_text() -> str:
    memory = psutil.virtual_memory().total / GIB
    return f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"


def package_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _total_bytes(processes: Iterable[psutil.Process]) -> int:
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
