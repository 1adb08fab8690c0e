"""The demo's live table: one line per tenant, the base model's busy share below. Fits 80 columns."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cola_runtime.client.values import Job, Service
from cola_runtime.demo.report import format_bytes

RIGHT_COLUMNS = ("step", "loss", "tok/s", "up", "down")


def live_table(jobs: Mapping[str, Job], service: Service, *, started: float, busy_before: float) -> Group:
    """What is shown while the four jobs run; `started` is time.monotonic() at the first submission."""
    elapsed = max(1e-9, time.monotonic() - started)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("tenant", "step", "loss", "tok/s", "encoding", "up", "down", "device"):
        table.add_column(name, justify="right" if name in RIGHT_COLUMNS else "left", no_wrap=True)
    for name, job in jobs.items():
        table.add_row(*_cells(name, job, elapsed))
    return Group(table, Text(_summary(service, elapsed=elapsed, busy_before=busy_before)))


def _cells(name: str, job: Job, elapsed: float) -> tuple[str, ...]:
    return (
        name,
        f"{job.version}/{job.total_steps}",
        "" if job.last_loss is None else f"{job.last_loss:.3f}",
        f"{job.tokens / elapsed:.0f}",
        job.encoding,
        format_bytes(job.bytes_up),
        format_bytes(job.bytes_down),
        job.device_id or job.state,
    )


def _summary(service: Service, *, elapsed: float, busy_before: float) -> str:
    busy = min(1.0, (service.base_busy_seconds - busy_before) / elapsed)
    devices = ", ".join(f"{device.device_id} {device.busy_seconds:.0f} s" for device in service.devices)
    return f"base busy {busy:.0%} of {elapsed:.0f} s, {service.base_steps} base steps; device work: {devices}"
