"""What every benchmark shares: its arguments, its record of machine and versions, and paired timing."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cola_runtime.machine import machine, versions

RESULTS_FOLDER = Path("benchmarks/results")


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser with `--quick` (under 50 s on two cores), `--json` and `--seed`; benchmarks add their own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smaller run, under 50 s on two cores")
    parser.add_argument("--json", action="store_true", help="print the record as one object on the last line")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def record(name: str, results: Mapping[str, Any], *, seed: int, started: datetime) -> dict[str, Any]:
    """`results` at the top level, with what is needed to judge and repeat them. `started` is in UTC."""
    context = {
        "benchmark": name,
        "date": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - started).total_seconds(), 3),
        "seed": seed,
        "command": _command(),
        "machine": machine(),
        "versions": versions(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }
    clash = context.keys() & results.keys()
    if clash:
        raise ValueError(f"results may not be named {sorted(clash)}")
    return {**context, **results}


def _command() -> str:
    """As it can be typed anywhere: a module that was run is named, not where it lies."""
    main = getattr(sys.modules["__main__"], "__spec__", None)
    named = [sys.argv[0]] if main is None else ["-m", main.name.removesuffix(".__main__")]
    return " ".join([Path(sys.executable).name, *named, *sys.argv[1:]])


def emit(record: Mapping[str, Any], as_json: bool, *, folder: Path = RESULTS_FOLDER) -> None:
    """Print a table, save `folder`/<benchmark>.json and, `as_json`, print the record as the last line."""
    fields = dict(_flat(record))
    width = max(map(len, fields))
    for name, value in fields.items():
        print(f"{name:<{width}}  {_text(value)}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['benchmark']}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(record), flush=True)


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of each measured round of one side, in round order, so that rounds of two sides pair up."""

    wall_seconds: tuple[float, ...]
    thread_cpu_seconds: tuple[float, ...]  # of the calling thread alone: steadier on a shared machine


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    wait: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time the sides in turn, round by round, so that a change of the machine's load meets all of them.

    Every second round goes through them backwards; the first `warmup` rounds are not counted, nor is what
    some sides `prepare` each time. `wait` returns when an accelerator has computed what it was asked for.
    """
    prepare = prepare or {}
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(warmup + rounds):
        order = list(sides) if number % 2 == 0 else list(reversed(list(sides)))
        for name in order:
            prepare.get(name, lambda: None)()
            seconds = _timed(sides[name], wait)
            if number >= warmup:
                measured[name].append(seconds)
    return {name: _timing(pairs) for name, pairs in measured.items()}


def _timing(pairs: Sequence[tuple[float, float]]) -> Timing:
    return Timing(
        wall_seconds=tuple(wall for wall, _ in pairs), thread_cpu_seconds=tuple(cpu for _, cpu in pairs)
    )


def _timed(side: Callable[[], object], wait: Callable[[], object]) -> tuple[float, float]:
    wait()
    wall, cpu = time.perf_counter(), time.thread_time()
    side()
    wait()
    return time.perf_counter() - wall, time.thread_time() - cpu


def compare(timings: Mapping[str, Timing], baseline: str) -> dict[str, dict[str, float]]:
    """Per side, for wall and thread-CPU time: median seconds and two ratios to `baseline`.

    `*_over_baseline` is the ratio of the medians, `*_paired_over_baseline` the median of the rounds' ratios;
    where the two disagree, the machine was not quiet.
    """
    base = timings[baseline]
    return {
        name: {
            **_against("wall", timing.wall_seconds, base.wall_seconds),
            **_against("thread_cpu", timing.thread_cpu_seconds, base.thread_cpu_seconds),
        }
        for name, timing in timings.items()
    }


def _against(clock: str, seconds: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    median = statistics.median(seconds)
    return {
        f"{clock}_median_seconds": median,
        f"{clock}_over_baseline": median / statistics.median(base),
        f"{clock}_paired_over_baseline": statistics.median(a / b for a, b in zip(seconds, base, strict=True)),
    }
