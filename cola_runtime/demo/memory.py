"""Peak memory of a process and everything that it started."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import TracebackType

import psutil

SAMPLE_SECONDS = 1.0  # a sample reads every process's page tables: a tenth of a second of CPU and more


class MemoryWatch:
    """Samples the proportional set size of this process and everything below it; a context manager.

    Shared pages are divided among those that map them (PSS), so that the sum is what the machine gives up.
    """

    def __init__(self, *, sample_seconds: float = SAMPLE_SECONDS) -> None:
        self.peak_bytes = 0
        self._sample_seconds = sample_seconds
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
        while not self._stop.wait(self._sample_seconds):
            self.peak_bytes = max(self.peak_bytes, _total_bytes([me, *me.children(recursive=True)]))


def _total_bytes(processes: Iterable[psutil.Process]) -> int:
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total
