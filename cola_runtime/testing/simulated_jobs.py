"""The jobs of a simulated service: whose they are, how large their steps are, how many steps they have."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from cola_runtime.scheduler.packing import PaddedRow

TOKEN_BUDGET = 1024
WEIGHTS = (1.0, 1.0, 2.0, 4.0)  # of tenants, in turn
SIZES = {"1 job": 1, "2 to 9 jobs": 9, "10 to 99 jobs": 99, "100 jobs and more": 10**9}  # of tenants


@dataclass(frozen=True, slots=True)
class Part:
    """One microbatch of every step of a job."""

    rows: int
    tokens: int


@dataclass(slots=True, kw_only=True)
class Job:
    number: int
    job_id: str
    tenant: int
    tenant_id: str
    size: str  # of its tenant
    padded: PaddedRow
    parts: tuple[Part, ...]
    steps: int
    device: int
    replica: int = -1
    done: int = 0
    life: int = 0  # grows when it loses its replica or device: what was under way is of no use then
    asked: float = 0.0  # when its step's microbatches arrived
    left: int = 0  # of them, that are not computed yet
    waiting: set[int] = field(default_factory=set)  # tickets

    @property
    def step_tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @property
    def padded_tokens(self) -> int:
        """Of a step, as computed alone."""
        return self.padded.total * sum(part.rows for part in self.parts)


def draw_jobs(drawn: random.Random, *, tenants: int, jobs: int, devices: int) -> list[Job]:
    """Each tenant has one job; whose the others are follows Zipf's law, so that a few have thousands."""
    odds = [1 / (rank + 1) ** 0.9 for rank in range(tenants)]
    owners = list(range(tenants)) + drawn.choices(range(tenants), odds, k=jobs - tenants)
    counts = Counter(owners)
    found = []
    for number, tenant in enumerate(owners):
        rows = min(64, int(4 * drawn.paretovariate(1.5)))
        length = min(512, max(8, round(32 * drawn.lognormvariate(0, 0.6))))
        found.append(
            Job(
                number=number,
                job_id=str(number),
                tenant=tenant,
                tenant_id=str(tenant),
                size=next(size for size, most in SIZES.items() if counts[tenant] <= most),
                padded=PaddedRow(length),
                parts=tuple(_parts(rows, length)),
                steps=min(2_000, int(drawn.paretovariate(1.3))),
                device=drawn.randrange(devices),
            )
        )
    return found


def weight_of(tenant: int) -> float:
    return WEIGHTS[tenant % len(WEIGHTS)]


def _parts(rows: int, length: int) -> Iterator[Part]:
    """As many as the token budget asks for; all rows are near one length, so that padding is small."""
    most = max(1, TOKEN_BUDGET // length)
    for start in range(0, rows, most):
        count = min(most, rows - start)
        yield Part(rows=count, tokens=sum(max(1, length - row % 3) for row in range(count)))
