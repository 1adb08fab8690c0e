"""How many heaps a process's threads allocate from, as its C library reports them."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from cola_runtime.machine import HEAPS

glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc here: no heap a thread")

HEAPS_OF_EIGHT_THREADS = """
import ctypes, sys, threading, types
from pathlib import Path

def show_heaps():
    met = threading.Barrier(8)
    threads = [threading.Thread(target=lambda: (bytearray(50_000), met.wait(20))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    glibc = ctypes.CDLL(None)
    glibc.fopen.restype = ctypes.c_void_p
    report = glibc.fopen(sys.argv[1].encode(), b"w")
    glibc.malloc_info(0, ctypes.c_void_p(report))
    glibc.fclose(ctypes.c_void_p(report))
"""
ALONE = "show_heaps()"
SHARED = "from cola_runtime.machine import share_heaps; share_heaps(); show_heaps()"
SERVED = """
name = "cola_runtime.runtime.coordinator"
sys.modules[name] = types.SimpleNamespace(serve=lambda *settings, **calls: show_heaps())
from cola_runtime.cli.serve import serve
serve(data_dir=Path(sys.argv[1]).parent)
"""


def heaps(script: str, folder: Path) -> int:
    report = folder / "heaps.xml"
    command = [sys.executable, "-c", HEAPS_OF_EIGHT_THREADS + script, str(report)]
    subprocess.run(command, check=True, timeout=60)
    return report.read_text().count("<heap nr=")


@glibc_only
def test_glibc_gives_every_thread_a_heap_unless_it_is_told_not_to(tmp_path: Path) -> None:
    assert heaps(ALONE, tmp_path) > HEAPS
    assert heaps(SHARED, tmp_path) == HEAPS


@glibc_only
def test_a_coordinators_threads_share_heaps(tmp_path: Path) -> None:
    assert heaps(SERVED, tmp_path) == HEAPS
