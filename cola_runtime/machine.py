"""What figures were measured on: processor, memory, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import psutil

RECORDED_PACKAGES = ("torch", "transformers", "peft", "ray", "grpcio")


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
