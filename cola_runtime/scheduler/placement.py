"""Which device trains which adapter. Pure: no clock, no I/O; the rule is in docs/scheduling.md.

A device works on its adapters' steps one after the other. What a step takes there is, up to a factor that all
devices share, the numbers of the adapter; what one round of steps takes is the numbers of all adapters that
the device holds over its measured speed. Whoever waits for a device waits at most for such a round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log2, prod

from cola_runtime.adapters.optimizer_state import training_bytes
from cola_runtime.adapters.shapes import weight_shapes
from cola_runtime.job_choices import TrustClass
from cola_runtime.jobs.plan import TrainingPlan

DEVICE_MEMORY = "DEVICE_MEMORY"  # why a job waits
LEAST_GAIN = 0.25
"""By how much a move must shorten the longer of two devices' rounds: less is not worth a checkpoint and a
lease. Every move shortens the sorted list of rounds from its top, so moves come to an end.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one device must have for an adapter, or for its largest shard."""

    numbers: int  # trainable
    memory_bytes: int  # weights (also those on their way out), gradient sums, optimizer state
    trust: frozenset[TrustClass] = frozenset({TrustClass.TRUSTED})  # which devices may see what the job sends

    @classmethod
    def of(cls, plan: TrainingPlan) -> Demand:
        """Of each of the plan's shards, the largest."""
        demands = [_demand(shard) for shard in plan.of_shards()]
        return max(demands, key=lambda demand: demand.numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A device as placement sees it."""

    device_id: str
    order: int  # in which devices joined
    speed: float  # numbers a second, by its own trial
    memory_bytes: int  # free for adapters that it does not hold yet
    trust: TrustClass = TrustClass.TRUSTED
    jobs: Mapping[str, Demand] = field(default_factory=dict)

    @property
    def round_seconds(self) -> float:
        """One step of every adapter that it holds."""
        return sum(demand.numbers for demand in self.jobs.values()) / self._speed

    @property
    def _speed(self) -> float:
        """Trials on a busy machine differ by tens of percent without meaning it: in powers of two."""
        return 2.0 ** round(log2(max(self.speed, 1.0)))

    def refusal(self, demand: Demand) -> str:
        """Why the adapter may not or cannot be here, or ""."""
        if self.trust not in demand.trust:
            accepted = ", ".join(sorted(demand.trust))
            return f"the job accepts devices of trust {accepted} only, and this one is {self.trust}"
        if demand.memory_bytes <= self.memory_bytes:
            return ""
        return (
            f"{DEVICE_MEMORY}: weights, gradients and optimizer state need {_mib(demand.memory_bytes)} MiB, "
            f"{_mib(self.memory_bytes)} MiB are free"
        )

    def having(self, job_id: str, demand: Demand) -> Offer:
        free = self.memory_bytes - demand.memory_bytes
        return replace(self, jobs={**self.jobs, job_id: demand}, memory_bytes=free)

    def without(self, job_id: str) -> Offer:
        free = self.memory_bytes + self.jobs[job_id].memory_bytes
        others = {other: demand for other, demand in self.jobs.items() if other != job_id}
        return replace(self, jobs=others, memory_bytes=free)


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    job_id: str
    source: str
    target: str


def place(job_id: str, demand: Demand, offers: Sequence[Offer], count: int) -> list[str]:
    """The `count` devices that would be through their round first with it; none if fewer have the memory.

    Equal rounds: the device with fewer adapters, then the one that joined first.
    """
    able = [offer for offer in offers if not offer.refusal(demand)]
    able.sort(key=lambda o: (o.having(job_id, demand).round_seconds, len(o.jobs), o.order))
    return [offer.device_id for offer in able[:count]] if len(able) >= count else []


def rebalance(offers: Sequence[Offer], movable: frozenset[str]) -> Move | None:
    """The move from the device with the longest round, of a job in `movable`, that leaves the shortest ones
    there and at its target; None unless that is less by `LEAST_GAIN`.
    """
    if len(offers) < 2:
        return None
    slowest = max(offers, key=lambda offer: offer.round_seconds)
    best, least = None, (1 - LEAST_GAIN) * slowest.round_seconds
    for job_id in sorted(movable & slowest.jobs.keys()):
        demand, left = slowest.jobs[job_id], slowest.without(job_id).round_seconds
        others = [offer for offer in offers if offer is not slowest and job_id not in offer.jobs]
        for target in place(job_id, demand, others, 1):
            there = next(offer for offer in others if offer.device_id == target)
            longest = max(left, there.having(job_id, demand).round_seconds)
            if longest <= least and (best is None or longest < least):
                best, least = Move(job_id=job_id, source=slowest.device_id, target=target), longest
    return best


def _demand(plan: TrainingPlan) -> Demand:
    shapes = weight_shapes(plan.adapter).values()
    numbers = sum(map(prod, shapes))
    itemsize = 8 if plan.adapter.dtype == "float64" else 4
    held = training_bytes(plan.optimizer, shapes, itemsize=itemsize, versions=1 + plan.max_staleness)
    return Demand(numbers=numbers, memory_bytes=held + numbers * itemsize, trust=plan.trust)


def _mib(value: int) -> int:
    return max(value, 0) >> 20
