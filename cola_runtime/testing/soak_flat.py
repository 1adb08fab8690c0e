"""Whether processes grow: memory, open files and threads of each process life, sampled and judged."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

MIB = 1 << 20
WARM_UP_SECONDS = 60.0  # imports, first allocations, buffers that are kept
LEAST_SECONDS = 120.0  # of a life behind its warm-up: of a shorter one no slope is taken
MEMORY_SLOPE_MIB_PER_MINUTE = 3.0  # most, as the median of a role's lives
EXTRA_FILES = 24  # most, above the median of a life's first third in its last third
EXTRA_THREADS = 12


@dataclass(frozen=True, slots=True)
class Sample:
    at: float  # seconds
    memory_bytes: int
    files: int
    threads: int


@dataclass(slots=True)
class Lives:
    """Samples of every process life, by its role."""

    of_role: dict[str, dict[int, list[Sample]]] = field(default_factory=lambda: defaultdict(dict))

    def sample(self, role: str, pid: int, *, at: float) -> None:
        """Look at a process; one that is gone leaves nothing."""
        try:
            process = psutil.Process(pid)
            with process.oneshot():
                seen = Sample(at, process.memory_info().rss, process.num_fds(), process.num_threads())
        except psutil.Error:
            return
        self.of_role[role].setdefault(pid, []).append(seen)

    def judged(self) -> dict[str, dict[str, Any]]:
        return {role: judge(list(lives.values())) for role, lives in sorted(self.of_role.items())}

    def violations(self) -> list[str]:
        return [
            f"{role} grows: {judged}" for role, judged in self.judged().items() if judged["flat"] is False
        ]


def judge(lives: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    """Of one role's lives; `flat` is None where none was long enough to tell."""
    warm = [[s for s in life if s.at >= life[0].at + WARM_UP_SECONDS] for life in lives if life]
    long = [life for life in warm if life and life[-1].at - life[0].at >= LEAST_SECONDS]
    kept: dict[str, Any] = {
        "lives": len(lives),
        "judged_lives": len(long),
        "largest_mib": round(max((s.memory_bytes for life in lives for s in life), default=0) / MIB, 1),
    }
    if not long:
        return {**kept, "flat": None}
    slopes = [60 * slope([(s.at, s.memory_bytes / MIB) for s in life]) for life in long]
    files = max(growth([s.files for s in life]) for life in long)
    threads = max(growth([s.threads for s in life]) for life in long)
    median = statistics.median(slopes)
    flat = median <= MEMORY_SLOPE_MIB_PER_MINUTE and files <= EXTRA_FILES and threads <= EXTRA_THREADS
    return {
        **kept,
        "longest_seconds": round(max(life[-1].at - life[0].at for life in long)),
        "memory_mib_per_minute": round(median, 3),
        "steepest_mib_per_minute": round(max(slopes), 3),
        "of_the_longest_mib_per_minute": round(_of_the_longest(long, slopes), 3),
        "extra_files": files,
        "extra_threads": threads,
        "course_of_the_longest": _course(max(lives, key=lambda life: life[-1].at - life[0].at)),
        "flat": flat,
    }


def _course(life: Sequence[Sample]) -> list[tuple[int, float]]:
    """Second of the life, MiB: about twenty points, for whoever wants to see how it went."""
    points = life[:: max(1, len(life) // 20)]
    return [(round(s.at - life[0].at), round(s.memory_bytes / MIB, 1)) for s in points]


def _of_the_longest(lives: Sequence[Sequence[Sample]], slopes: Sequence[float]) -> float:
    spans = [life[-1].at - life[0].at for life in lives]
    return slopes[spans.index(max(spans))]


def slope(points: Sequence[tuple[float, float]], *, most: int = 150) -> float:
    """Theil and Sen's: the median slope of all pairs, of at most so many points; one jump moves it little."""
    step = max(1, len(points) // most)
    slopes = [
        (later - earlier) / (after - before)
        for (before, earlier), (after, later) in itertools.combinations(points[::step], 2)
        if after > before
    ]
    return statistics.median(slopes) if slopes else 0.0


def growth(values: Sequence[int]) -> float:
    """The median of the last third above that of the first."""
    third = max(1, len(values) // 3)
    return statistics.median(values[-third:]) - statistics.median(values[:third])


def thresholds() -> Mapping[str, float]:
    return {
        "memory_mib_per_minute": MEMORY_SLOPE_MIB_PER_MINUTE,
        "extra_files": EXTRA_FILES,
        "extra_threads": EXTRA_THREADS,
        "warm_up_seconds": WARM_UP_SECONDS,
    }
