"""How fair the scheduler is: served tokens over weight, and what one tenant's many jobs do to another.

    python benchmarks/fairness.py [--quick] [--json] [--seed N]

Drives the real SchedulerLoop against a modelled base model in virtual time (an event loop whose clock jumps
to the next timer: testing/virtual_time.py, testing/modelled.py), so the result does not depend on this
machine. Step times are those of SmolLM2-135M in float32 on one core.

1. Four tenants with weights 1, 1, 2, 4; jobs of 2 to 64 rows a step, rows of 8 to 128 tokens. Served tokens
   over weight in every window of 100 base steps: `worst_window_error` is the largest |tenant / mean - 1|.
   Jain's index of the same, over the whole run. Everybody always has something waiting. The base model lays
   rows end to end, as a Llama on a CPU does; `padded_worst_window_error` is that of one which pads them.
2. The step latency of a tenant with one job (8 rows of about 40 tokens) beside a tenant with 1, 64 and 1,000
   such jobs. Its fair share is half the base model, so twice its latency alone; and since a base step is not
   broken off, it may find one full one running when it comes back from its device. `flood_over_allowed` is
   the latency beside 1,000 jobs over 1.05 * 2 * alone + one full base step: at most 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from cola_runtime.config import SchedulerSettings
from cola_runtime.scheduler.loop import SchedulerLoop
from cola_runtime.scheduler.waiting import Share
from cola_runtime.testing.backlogs import jain_index
from cola_runtime.testing.modelled import (
    STEP_SECONDS,
    TOKEN_SECONDS,
    ComputedStep,
    ModelledBase,
    ModelledJob,
)
from cola_runtime.testing.record import argument_parser, emit, record
from cola_runtime.testing.virtual_time import run_in_virtual_time

TOKEN_BUDGET = 2048
WINDOW = 100
WEIGHTS = {"small": 1.0, "long": 1.0, "wide": 2.0, "mixed": 4.0}
JOBS = {"small": 200, "long": 40, "wide": 10, "mixed": 150}
ROWS = {"small": 2, "long": 4, "wide": 64, "mixed": 8}
FLOOD_JOBS = 1000
SHORT_BUDGET = 512


def lognormal(median: float, sigma: float, lowest: int, highest: int) -> Callable[[random.Random], int]:
    return lambda drawn: min(highest, max(lowest, round(median * drawn.lognormvariate(0, sigma))))


LENGTHS = {
    "small": lognormal(16, 0.3, 8, 32),
    "long": lognormal(96, 0.3, 64, 128),
    "wide": lognormal(40, 0.5, 8, 128),
    "mixed": lognormal(48, 0.9, 8, 128),
}


def main() -> None:
    arguments = argument_parser(__doc__ or "").parse_args()
    started = datetime.now(UTC)
    steps = 400 if arguments.quick else 3000
    errors = {
        unpadded: window_errors(run_in_virtual_time(weighted(steps, arguments.seed, unpadded=unpadded)))
        for unpadded in (True, False)
    }
    flood = latencies(300 if arguments.quick else 1500, arguments.seed)
    results: dict[str, Any] = {
        **errors[True],
        "padded_worst_window_error": errors[False]["worst_window_error"],
        "token_budget": TOKEN_BUDGET,
        "window_base_steps": WINDOW,
        **flood,
    }
    emit(record("fairness", results, seed=arguments.seed, started=started), arguments.json)


async def weighted(steps: int, seed: int, *, unpadded: bool) -> Sequence[ComputedStep]:
    jobs = [
        ModelledJob(job_id=f"{tenant}-{number}", tenant_id=tenant, rows=ROWS[tenant], draw=LENGTHS[tenant])
        for tenant, count in JOBS.items()
        for number in range(count)
    ]
    base, _ = await driven(jobs, steps=steps, seed=seed, weights=WEIGHTS, unpadded=unpadded)
    return base.steps


async def driven(
    jobs: Sequence[ModelledJob],
    *,
    steps: int,
    seed: int,
    weights: dict[str, float] | None = None,
    watched: str = "",
    token_budget: int = TOKEN_BUDGET,
    unpadded: bool = True,
) -> tuple[ModelledBase, list[float]]:
    """Run the jobs for so many base steps; also the step latencies of the watched job."""
    base = ModelledBase(unpadded=unpadded)
    seen: list[float] = []
    settings = SchedulerSettings(token_budget=token_budget)
    loop = SchedulerLoop(base, settings, on_base_lost=print, unpadded=unpadded)  # type: ignore[arg-type]
    for tenant, weight in (weights or {}).items():
        loop.set_share(tenant, Share(weight=weight))
    tasks = [asyncio.create_task(loop.run_forever())]
    for job in jobs:
        run = job.run(loop, seed=f"{seed} {job.job_id}", latencies=seen if job.job_id == watched else None)
        tasks.append(asyncio.create_task(run))
    await base.done(steps)
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    return base, seen


def window_errors(steps: Sequence[ComputedStep]) -> dict[str, Any]:
    """Over every window of WINDOW base steps behind the first one, in which jobs start."""
    per_step = [{tenant: 0.0 for tenant in WEIGHTS} for _ in steps]
    for served, computed in zip(per_step, steps, strict=True):
        for job, tokens in computed.tokens_by_job.items():
            tenant = job.rpartition("-")[0]
            served[tenant] += tokens / WEIGHTS[tenant]
    worst, errors = 0.0, []
    for start in range(WINDOW, len(steps) - WINDOW):
        window = per_step[start : start + WINDOW]
        totals = [sum(served[tenant] for served in window) for tenant in WEIGHTS]
        mean = statistics.mean(totals)
        errors.append(max(abs(total / mean - 1) for total in totals))
        worst = max(worst, errors[-1])
    whole = [sum(served[tenant] for served in per_step[WINDOW:]) for tenant in WEIGHTS]
    return {
        "worst_window_error": worst,
        "median_window_error": statistics.median(errors),
        "jain_index": jain_index(whole),
        "base_steps": len(steps),
        "served_over_weight": dict(zip(WEIGHTS, whole, strict=True)),
    }


def latencies(steps: int, seed: int) -> dict[str, Any]:
    """Mean step latency of a tenant's one job, by how many jobs its neighbour has."""

    def mean(neighbours: int) -> float:
        jobs = [ModelledJob(job_id="mine-0", tenant_id="mine", rows=8, draw=LENGTHS["wide"])]
        jobs += [
            ModelledJob(job_id=f"other-{n}", tenant_id="other", rows=8, draw=LENGTHS["wide"])
            for n in range(neighbours)
        ]
        work = driven(jobs, steps=steps, seed=seed, watched="mine-0", token_budget=SHORT_BUDGET)
        return statistics.mean(run_in_virtual_time(work)[1][5:])

    by_neighbours = {str(neighbours): mean(neighbours) for neighbours in (0, 1, 64, FLOOD_JOBS)}
    allowed = 1.05 * 2 * by_neighbours["0"] + STEP_SECONDS + TOKEN_SECONDS * SHORT_BUDGET
    return {
        "flood_over_allowed": by_neighbours[str(FLOOD_JOBS)] / allowed,
        "flood_token_budget": SHORT_BUDGET,
        "step_latency_seconds_by_neighbours_jobs": by_neighbours,
    }


if __name__ == "__main__":
    main()
