"""Spans of several processes as one trace in Chrome's format, for Perfetto and chrome://tracing.

JSON object format: `traceEvents` of complete events (`ph` X, microseconds since the recording began) and of
metadata that names processes and lanes; `otherData` has what is known of the recording.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cola_runtime.trace.spans import ProcessSpans

BASE_MODEL, COORDINATOR, DEVICE = "base model", "coordinator", "device"  # roles, first in a process's name


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedProcess:
    """One process's spans, and how its clock stands to the trace's."""

    name: str
    role: str
    recorded: ProcessSpans
    offset: float = 0.0  # added to its times they are the coordinator's
    error: float = 0.0  # the offset is wrong by no more than this, in seconds


def chrome_trace(processes: Sequence[TracedProcess], *, began: float, ended: float) -> dict[str, Any]:
    """The trace of a recording from `began` to `ended` on the coordinator's clock."""
    events: list[dict[str, Any]] = []
    for number, process in enumerate(processes, start=1):
        events += _process_events(process, number, began)
    about = {
        "seconds": ended - began,
        "clock_errors_ms": {each.name: 1e3 * each.error for each in processes},
        "spans": {each.name: len(each.recorded.spans) for each in processes},
        "spans_forgotten": {
            each.name: each.recorded.recorded - len(each.recorded.spans) for each in processes
        },
    }
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def trace_bytes(trace: dict[str, Any]) -> bytes:
    return json.dumps(trace, separators=(",", ":"), allow_nan=False).encode()


def _process_events(process: TracedProcess, number: int, began: float) -> list[dict[str, Any]]:
    lanes: dict[str, int] = {}
    events = []
    for span in process.recorded.spans:
        lane = lanes.setdefault(span.lane, len(lanes) + 1)
        events.append(
            {
                "name": span.name,
                "cat": process.role,
                "ph": "X",
                "ts": 1e6 * (span.begin + process.offset - began),
                "dur": 1e6 * (span.end - span.begin),
                "pid": number,
                "tid": lane,
                "args": dict(span.details),
            }
        )
    names = [_named("process_name", process.name, number, 0)]
    names += [_named("thread_name", lane, number, index) for lane, index in lanes.items()]
    return names + events


def _named(kind: str, name: str, process: int, lane: int) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": lane, "args": {"name": name}}
