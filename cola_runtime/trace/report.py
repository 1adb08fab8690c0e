"""What a recorded trace says: how busy base model and devices were, where the base model waited, and why.

Pure; reads the JSON of `chrome.py`. Seconds count from the beginning of the recording. A base model is busy
while it is in a base step; shares are of the time from its first base step's beginning to its last one's end.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from cola_runtime.errors import InvalidInput
from cola_runtime.trace.chrome import BASE_MODEL, COORDINATOR, DEVICE

BASE_STEP = "base step"
EXPORT = "export"
QUEUED = "queued"  # a job's microbatch waits for a base step
WORKER = "worker"  # the lane of a device's arithmetic
LONGEST_GAPS = 5
USUAL_SHARE = 0.99  # of the other gaps are no longer than the usual one


class Interval(NamedTuple):
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    def overlap(self, other: Interval) -> float:
        return max(0.0, min(self.end, other.end) - max(self.begin, other.begin))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Between two base steps nothing was computed."""

    begin: float
    seconds: float
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Exports:
    """What exports did to the base model. A gap is here what its thread did nothing in, not even an install.
    The step behind a gap during an export counts as delayed if no gap without one is as long.
    """

    exports: int
    base_steps_meanwhile: int  # that began or ended during an export
    gaps_meanwhile: int
    usual_gap_seconds: float  # of the gaps without an export, USUAL_SHARE are no longer
    longest_gap_seconds: float  # without an export
    longest_gap_meanwhile_seconds: float
    delayed_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceReport:
    base_busy: float
    base_steps: int
    seconds: float  # from the first base step's beginning to the last one's end
    tokens: int
    padding: float  # share of the computed tokens
    base_other_work: Mapping[str, float]  # what else its thread did, as shares of the time
    device_busy: Mapping[str, float]
    longest_gaps: Sequence[Gap]
    exports: Exports
    base_models: Mapping[str, float]  # each replica's busy share meanwhile; all else is of the busiest


@dataclass(slots=True)
class _Process:
    name: str = ""
    role: str = ""
    lanes: dict[int, str] = field(default_factory=dict)
    spans: list[tuple[str, str, Interval, Mapping[str, Any]]] = field(default_factory=list)  # lane, name

    def named(self, name: str) -> list[Interval]:
        return sorted(interval for _, each, interval, _ in self.spans if each == name)


def read_trace(trace: Mapping[str, Any]) -> TraceReport:
    """Raises InvalidInput `TRACE_INVALID` for what is no trace of a service, or one without base steps."""
    processes = _processes(trace)
    bases = [process for process in processes if process.role == BASE_MODEL and process.named(BASE_STEP)]
    if not bases:
        raise InvalidInput("TRACE_INVALID", "the trace holds no base step", remedy="Record while jobs train.")
    base = max(bases, key=lambda process: len(process.named(BASE_STEP)))
    steps = merged(base.named(BASE_STEP))
    window = Interval(steps[0].begin, steps[-1].end)
    details = [about for _, name, _, about in base.spans if name == BASE_STEP]
    computed = sum(int(about.get("computed_tokens", 0)) for about in details)
    tokens = sum(int(about.get("tokens", 0)) for about in details)
    return TraceReport(
        base_busy=sum(step.seconds for step in steps) / window.seconds,
        base_steps=len(details),
        seconds=window.seconds,
        tokens=tokens,
        padding=1 - tokens / computed if computed else 0.0,
        base_other_work=_other_work(base, window),
        device_busy={
            process.name: _share([i for lane, _, i, _ in process.spans if lane == WORKER], window)
            for process in processes
            if process.role == DEVICE
        },
        longest_gaps=_longest_gaps(gaps_between(steps), base, processes),
        exports=_exports(steps, base, [i for process in processes for i in process.named(EXPORT)]),
        base_models={each.name: _share(each.named(BASE_STEP), window) for each in bases},
    )


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Their union, in order."""
    union: list[Interval] = []
    for interval in sorted(intervals):
        if union and interval.begin <= union[-1].end:
            union[-1] = Interval(union[-1].begin, max(union[-1].end, interval.end))
        else:
            union.append(interval)
    return union


def gaps_between(steps: Sequence[Interval]) -> list[Interval]:
    return [Interval(before.end, after.begin) for before, after in pairwise(steps)]


def _processes(trace: Mapping[str, Any]) -> list[_Process]:
    found: defaultdict[int, _Process] = defaultdict(_Process)
    try:
        for event in trace["traceEvents"]:
            process = found[event["pid"]]
            if event["ph"] == "M" and event["name"] == "process_name":
                process.name = event["args"]["name"]
            elif event["ph"] == "M":
                process.lanes[event["tid"]] = event["args"]["name"]
        for event in trace["traceEvents"]:
            if event["ph"] != "X":
                continue
            process = found[event["pid"]]
            process.role = event["cat"]
            begin = event["ts"] / 1e6
            interval = Interval(begin, begin + event["dur"] / 1e6)
            process.spans.append((process.lanes[event["tid"]], event["name"], interval, event["args"]))
    except (KeyError, TypeError) as error:
        raise InvalidInput("TRACE_INVALID", f"not a trace of this service: {error!r}") from error
    return list(found.values())


def _share(intervals: Iterable[Interval], window: Interval) -> float:
    return sum(each.overlap(window) for each in merged(intervals)) / window.seconds


def _other_work(base: _Process, window: Interval) -> dict[str, float]:
    lane = next(lane for lane, name, _, _ in base.spans if name == BASE_STEP)
    names = {name for each, name, _, _ in base.spans if each == lane and name != BASE_STEP}
    return {name: _share(base.named(name), window) for name in sorted(names)}


def _longest_gaps(gaps: Sequence[Interval], base: _Process, processes: Sequence[_Process]) -> list[Gap]:
    longest = sorted(gaps, key=lambda gap: -gap.seconds)[:LONGEST_GAPS]
    return [Gap(begin=gap.begin, seconds=gap.seconds, cause=_cause(gap, base, processes)) for gap in longest]


def _cause(gap: Interval, base: _Process, processes: Sequence[_Process]) -> str:
    """What the base model's thread did instead; else whether a microbatch waited; else what the jobs did."""
    lane = next(lane for lane, name, _, _ in base.spans if name == BASE_STEP)
    instead = _most((name, i) for each, name, i, _ in base.spans if each == lane and name != BASE_STEP)(gap)
    if instead and instead[1] > gap.seconds / 2:
        return f"the base model's thread was at {instead[0]}"
    coordinators = [process for process in processes if process.role == COORDINATOR]
    queued = merged(i for process in coordinators for i in process.named(QUEUED))
    if sum(each.overlap(gap) for each in queued) > gap.seconds / 2:
        return "a microbatch waited: the coordinator was choosing and sending the next base step"
    doing = _most((name, i) for p in coordinators for lane, name, i, _ in p.spans if lane.startswith("job "))(
        gap
    )
    if doing is None:
        return "no job was there"
    return f"no microbatch waited; most of the jobs' time was: {doing[0]}"


def _most(spans: Iterable[tuple[str, Interval]]) -> Any:
    """A function of a gap: the name with the largest overlap, and that in seconds."""
    listed = list(spans)

    def of(gap: Interval) -> tuple[str, float] | None:
        seconds: defaultdict[str, float] = defaultdict(float)
        for name, interval in listed:
            overlap = interval.overlap(gap)
            if overlap > 0:
                seconds[name] += overlap
        return max(seconds.items(), key=lambda item: item[1]) if seconds else None

    return of


def _exports(steps: Sequence[Interval], base: _Process, exports: Sequence[Interval]) -> Exports:
    lane = next(lane for lane, name, _, _ in base.spans if name == BASE_STEP)
    window = Interval(steps[0].begin, steps[-1].end)
    at_work = merged(i for each, _, i, _ in base.spans if each == lane and i.overlap(window) > 0)
    gaps = gaps_between(at_work)
    during = [any(gap.overlap(each) > 0 for each in exports) for gap in gaps]
    meanwhile = [gap.seconds for gap, overlaps in zip(gaps, during, strict=True) if overlaps]
    others = sorted(gap.seconds for gap, overlaps in zip(gaps, during, strict=True) if not overlaps)
    longest = others[-1] if others else 0.0
    return Exports(
        exports=len(exports),
        base_steps_meanwhile=sum(any(step.overlap(each) > 0 for each in exports) for step in steps),
        gaps_meanwhile=len(meanwhile),
        usual_gap_seconds=others[math.ceil(USUAL_SHARE * len(others)) - 1] if others else 0.0,
        longest_gap_seconds=longest,
        longest_gap_meanwhile_seconds=max(meanwhile, default=0.0),
        delayed_steps=sum(gap > longest for gap in meanwhile),
    )
