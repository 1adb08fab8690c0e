"""A service of 64 replicas, 2,000 devices, 10,000 tenants and 100,000 jobs, simulated around the real policy.

    python benchmarks/simulate.py [--quick] [--json] [--seed N]

Discrete events (cola_runtime/testing/simulated_service.py). Real: the fair queue (one per replica,
cola_runtime/scheduler/policy.py) with its packing, charging and bounds; what is computed for a tenant at one
replica counts at all others. Modelled, from the figures in benchmarks/README.md: a base step takes
STEP_SECONDS + TOKEN_SECONDS per padded token; a device needs DEVICE_SECONDS per step, one at a time. Assumed:
jobs arrive at random at 95 % of what the replicas can compute; tenants' numbers of jobs follow Zipf's law,
steps and rows per step of a job are heavy-tailed (Pareto); a job's rows are all near one length drawn for it
(log-normal), so that a microbatch has little padding of its own; one above the token budget goes in parts; a
job goes to the replica with the shortest round and stays there, and to a device drawn at random; tenants have
weights 1, 1, 2 and 4 in turn.

Failures: a replica is gone for 60 s and its base step is lost; its jobs go on at others after 2 s. A device
is gone for good; its jobs go on after 30 s with another one. Both repeat what the job did since its newest
checkpoint, one in ten steps. Rates are per hour of one machine: once, then 100 and 1,000 times that.

Prints utilisation of the replicas while jobs arrive, queue time (arrival of a step's microbatches to the end
of its last base step) by size of tenant, what a decision and telling the other replicas cost here, and
fairness: Jain's index of tokens over weight that the whole service computed in a window of 600 s, among
tenants that had something waiting at every moment of it (their number, the mean and the worst window). At
95 % of what can be computed (`calm`) nobody is kept from anything for long, and hardly anybody counts; so in
further runs (`rush`) half more arrives than can be computed, and whoever asks for more than a share waits.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from cola_runtime.testing.backlogs import FairWindow
from cola_runtime.testing.record import argument_parser, emit, record
from cola_runtime.testing.simulated_jobs import TOKEN_BUDGET
from cola_runtime.testing.simulated_service import WINDOW_SECONDS, Scale, Simulation

LOAD = 0.95
RUSH = 1.5
SMALL = Scale(tenants=1_250, jobs=12_500, replicas=8, devices=250, load=LOAD)
LARGE = Scale(tenants=10_000, jobs=100_000, replicas=64, devices=2_000, load=LOAD)


def main() -> None:
    arguments = argument_parser(__doc__ or "").parse_args()
    started = datetime.now(UTC)
    runs = {}
    for name, scale in scales(quick=arguments.quick).items():
        simulation = Simulation(scale, arguments.seed)
        simulation.run()
        runs[name] = summary(simulation)
    largest = next(reversed(runs.values()))
    results: dict[str, Any] = {
        "token_budget": TOKEN_BUDGET,
        "window_seconds": WINDOW_SECONDS,
        **{name: largest[name] for name in ("utilisation", "decision_ms", "telling_ms")},
        "runs": runs,
    }
    emit(record("simulate", results, seed=arguments.seed, started=started), arguments.json)


def scales(*, quick: bool) -> dict[str, Scale]:
    """By the names that the record gives them."""
    sizes = [Scale(tenants=500, jobs=5_000, replicas=8, devices=100, load=LOAD)] if quick else [SMALL, LARGE]
    found = {}
    for size in sizes:
        for load, word in ((LOAD, "calm"), (RUSH, "rush")):
            for failures in (1.0, 1000.0) if quick or load == RUSH else (1.0, 100.0, 1000.0):
                name = f"{size.replicas} replicas, {word}, failures x {failures:g}"
                found[name] = replace(size, load=load, failures=failures)
    return found


def summary(simulation: Simulation) -> dict[str, Any]:
    measured = simulation.measured
    return {
        "simulated_hours": simulation.arrival_seconds / 3600,
        "utilisation": simulation.utilisation,
        "padding": 1 - measured.real_tokens / measured.computed_tokens,
        "steps_done": measured.steps_done,
        "steps_repeated": measured.steps_repeated,
        "jobs_done": measured.jobs_done,
        "failures": measured.failures,
        "microbatches_per_base_step": measured.microbatches / measured.decisions,
        "decision_ms": 1e3 * measured.decision_seconds / measured.decisions,
        "telling_ms": 1e3 * measured.telling_seconds / measured.decisions,
        "decisions_per_second_per_replica": measured.decisions
        / simulation.arrival_seconds
        / simulation.replicas,
        "fairness": fairness(simulation.backlogs.windows),
        "queue_seconds_p50_p90_p99": {
            size: _percentiles(waits) for size, waits in measured.queue_seconds.items()
        },
    }


def fairness(windows: list[FairWindow]) -> dict[str, Any]:
    if not windows:
        return {"windows": 0}
    return {
        "windows": len(windows),
        "tenants_mean": statistics.fmean(window.tenants for window in windows),
        "jain_index_mean": statistics.fmean(window.jain_index for window in windows),
        "jain_index_worst": min(window.jain_index for window in windows),
        "least_over_mean": statistics.fmean(window.least_over_mean for window in windows),
        "most_over_mean": statistics.fmean(window.most_over_mean for window in windows),
    }


def _percentiles(waits: list[float]) -> list[float]:
    if len(waits) < 2:
        return []
    cuts = statistics.quantiles(waits, n=100)
    return [round(cuts[at], 2) for at in (49, 89, 98)]


if __name__ == "__main__":
    main()
