"""What a scheduling decision costs, and how much of what it packs is padding.

    python benchmarks/policy.py [--quick] [--json] [--seed N]

1. A decision with 1,000, 10,000 and 100,000 microbatches waiting (ten per tenant, 8 rows of real text each,
   token budget 1,024): choosing, charging, removing what was taken, queueing what follows it, and one
   cancelled microbatch that comes back. CPU time of the deciding thread (`decision_p99_ms`: at the largest
   queue) and wall time beside it, each decision at its fastest of three identical runs (--quick: one), as the
   machine is shared.
2. Padding, as a share of computed tokens, of K tenants with one job each (8 rows a step, in turn film
   dialogue, text messages, German talk and chat; a device takes one base step to train): of a base model
   that lays rows end to end, which pads only segments that stack (as a Llama on a CPU), of one that cuts a
   step into passes of near lengths (others on a CPU), and of one that pads rows to the longest (on a CUDA
   device), packed by bands of near length over the look-ahead window.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from cola_runtime.base_model.near_passes import PASS_TOKENS
from cola_runtime.base_model.near_sizes import near_sizes
from cola_runtime.base_model.segments import COHORT_TOKENS
from cola_runtime.scheduler.packing import PaddedRow
from cola_runtime.scheduler.policy import FairQueue
from cola_runtime.scheduler.waiting import Waiting, padded_tokens
from cola_runtime.testing.real_lengths import demo_row_lengths
from cola_runtime.testing.record import argument_parser, emit, record

SIZES = (1_000, 10_000, 100_000)
JOBS_PER_TENANT = 10
ROWS = 8
TOKEN_BUDGET = 1024
TENANTS = (1, 4, 16, 64)
BUDGETS = (512, 1024, 2048)
Way = Literal["end to end", "near passes", "padded"]


def main() -> None:
    arguments = argument_parser(__doc__ or "").parse_args()
    started = datetime.now(UTC)
    lengths = demo_row_lengths()
    decisions, repetitions = (200, 1) if arguments.quick else (1000, 3)
    costs = {
        str(size): decision_cost(size, lengths, arguments.seed, decisions=decisions, repetitions=repetitions)
        for size in SIZES
    }
    steps = 150 if arguments.quick else 1500
    largest = costs[str(SIZES[-1])]
    results: dict[str, Any] = {
        "decision_p99_ms": largest["cpu_p99_ms"],
        "decision_wall_p99_ms": largest["wall_p99_ms"],
        "p50_growth_per_tenfold": (largest["cpu_p50_ms"] / costs[str(SIZES[0])]["cpu_p50_ms"]) ** 0.5,
        "token_budget": TOKEN_BUDGET,
        "waiting": costs,
        "packing": {
            f"K={tenants} budget={budget}": packing(tenants, budget, lengths, steps=steps)
            for budget in ((TOKEN_BUDGET,) if arguments.quick else BUDGETS)
            for tenants in TENANTS
        },
    }
    emit(record("policy", results, seed=arguments.seed, started=started), arguments.json)


class Draw:
    """Microbatches of real rows, for one of the ways in which base models lay rows."""

    def __init__(self, lengths: dict[str, list[int]], seed: int, *, way: Way) -> None:
        self._lengths, self._random = list(lengths.values()), random.Random(seed)
        self._way = way
        self._drawn: dict[int, list[int]] = {}  # lengths of a microbatch's rows, by its ticket
        self._ticket = 0

    def microbatch(self, tenant: int, job: int) -> Waiting:
        self._ticket += 1
        lengths = self._random.choices(self._lengths[tenant % len(self._lengths)], k=ROWS)
        self._drawn[self._ticket] = lengths
        padded = self._way == "padded"
        return Waiting(
            ticket=self._ticket,
            tenant_id=f"tenant-{tenant}",
            job_id=f"job-{job}",
            rows=ROWS if padded else sum(lengths),
            tokens=sum(lengths),
            padded=PaddedRow(max(lengths) if padded else 1),
            train=True,
        )

    def computed(self, chosen: Sequence[Waiting]) -> int:
        """Tokens of a base step: end to end padded where segments stack (all adapters are alike)."""
        if self._way == "padded":
            return padded_tokens(chosen)
        if self._way == "end to end":
            sizes, further = [entry.tokens for entry in chosen], COHORT_TOKENS
        else:
            sizes, further = [length for entry in chosen for length in self._drawn[entry.ticket]], PASS_TOKENS
        return sum(len(part) * max(sizes[n] for n in part) for part in near_sizes(sizes, further=further))


def decision_cost(
    size: int, lengths: dict[str, list[int]], seed: int, *, decisions: int, repetitions: int
) -> dict[str, float]:
    """Milliseconds of a decision at a steady number of waiting microbatches.

    The queue is deterministic, so the same history is played several times and each decision counts with
    its fastest time: what it costs, without what else this machine did meanwhile.
    """
    played = [play(size, Draw(lengths, seed, way="padded"), decisions=decisions) for _ in range(repetitions)]
    wall, cpu = ([min(each) for each in zip(*clock, strict=True)] for clock in zip(*played, strict=True))
    return {**_percentiles("cpu", cpu), **_percentiles("wall", wall)}


def play(size: int, draw: Draw, *, decisions: int) -> tuple[list[float], list[float]]:
    """Wall and CPU seconds of each decision."""
    queue, waiting = FairQueue(), {}
    for job in range(size):
        entry = draw.microbatch(job // JOBS_PER_TENANT, job)
        waiting[entry.ticket] = entry
        queue.add(entry, now=0.0)
    wall: list[float] = []
    cpu: list[float] = []
    cancelled = 1
    for turn in range(decisions + 20):
        follow = {ticket: draw.microbatch(*_numbers(waiting[ticket])) for ticket in _likely(queue)}
        started = time.perf_counter(), time.thread_time()
        chosen = queue.choose(token_budget=TOKEN_BUDGET, now=0.0)
        queue.take(chosen, now=0.0)
        for entry in chosen:
            queue.add(follow[entry.ticket], now=0.0)
        if cancelled in queue:
            queue.remove(cancelled, now=0.0)
            queue.add(waiting[cancelled], now=0.0)
        if turn >= 20:
            wall.append(time.perf_counter() - started[0])
            cpu.append(time.thread_time() - started[1])
        for entry in chosen:
            del waiting[entry.ticket]
            cancelled = follow[entry.ticket].ticket
            waiting[cancelled] = follow[entry.ticket]
    return wall, cpu


def _likely(queue: FairQueue) -> list[int]:
    """The tickets that the coming decision takes, so that what follows them is drawn outside the timing."""
    return [entry.ticket for entry in queue.choose(token_budget=TOKEN_BUDGET, now=0.0)]


def _numbers(waiting: Waiting) -> tuple[int, int]:
    return int(waiting.tenant_id.rpartition("-")[2]), int(waiting.job_id.rpartition("-")[2])


def _percentiles(clock: str, seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {f"{clock}_p50_ms": 1e3 * cuts[49], f"{clock}_p99_ms": 1e3 * cuts[98]}


def packing(tenants: int, budget: int, lengths: dict[str, list[int]], *, steps: int) -> dict[str, float]:
    end_to_end, near, banded = (
        Steady(Draw(lengths, tenants, way=way), tenants).run(steps, budget) for way in get_args(Way)
    )
    return {
        "padding": end_to_end["padding"],
        "step_tokens": end_to_end["step_tokens"],
        "near_passes_padding": near["padding"],
        "near_passes_step_tokens": near["step_tokens"],
        "padded_rows_padding": banded["padding"],
        "padded_rows_step_tokens": banded["step_tokens"],
        "computed_over_padded_rows": (1 - banded["padding"]) / (1 - end_to_end["padding"]),
    }


class Steady:
    """Tenants whose next microbatch is there when their device is done: one base step after the last."""

    def __init__(self, draw: Draw, tenants: int) -> None:
        self._draw, self._tenants = draw, tenants
        self.queue = FairQueue()
        self.waiting: dict[int, Waiting] = {}
        for tenant in range(tenants):
            self._arrive(tenant)

    def run(self, steps: int, budget: int) -> dict[str, float]:
        real = computed = sent = 0
        training: list[int] = []
        for _ in range(steps):
            arriving, training = training, []
            chosen = self.queue.choose(token_budget=budget, now=0.0)
            if chosen:
                self.queue.take(chosen, now=0.0)
                real += sum(entry.tokens for entry in chosen)
                computed += self._draw.computed(chosen)
                sent += 1
            for entry in chosen:
                training.append(_numbers(self.waiting.pop(entry.ticket))[0])
            for tenant in arriving:
                self._arrive(tenant)
        return {"padding": 1 - real / computed, "step_tokens": computed / sent}

    def _arrive(self, tenant: int) -> None:
        entry = self._draw.microbatch(tenant, tenant)
        self.waiting[entry.ticket] = entry
        self.queue.add(entry, now=0.0)


if __name__ == "__main__":
    main()
