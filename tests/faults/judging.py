"""The job that every fault case trains, and what a case must show: the same adapter as without the fault.

The job is alone, and a step is one microbatch, so that its base steps are composed alike whatever happens. So
its last checkpoint (weights, optimizer state, versions) has the same bytes on a CPU in float32, or something
was lost, repeated or mixed up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cola_runtime.adapters.checkpoint_format import decode_checkpoint
from cola_runtime.adapters.optimizer_state import STEP
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.client.values import Event
from cola_runtime.testing.exactness import MixedJob, four_tenants, service_for, tenant_client
from cola_runtime.testing.in_process import running_in_process

MODEL = "tiny"
STEPS = 12
CHECKPOINT_EVERY = 3
WAIT_SECONDS = 240.0
TARGET_SECONDS = {
    "device": 30.0,
    "base model": 60.0,
    "coordinator": 60.0,
    "stream": 30.0,
    "storage": 60.0,
    "head": 120.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Faultless:
    """What the job gives when nothing goes wrong."""

    losses: tuple[float, ...]
    checkpoint_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One case's row of the table."""

    part: str  # whose target of recovery holds
    case: str
    faults: int
    steps_lost: int
    applied_twice: int
    bit_identical: bool
    recovery_seconds: float  # the longest time without a new step, from the fault on
    target_seconds: float
    steps_made_again: int  # computed a second time from a checkpoint, which is no loss
    leases: int

    @property
    def kept(self) -> bool:
        """The damage was done, and nothing came of it."""
        return self.faults > 0 and self.steps_lost == 0 and self.applied_twice == 0 and self.bit_identical

    @property
    def good(self) -> bool:
        return self.kept and self.recovery_seconds <= self.target_seconds

    def fields(self) -> dict[str, Any]:
        return {**asdict(self), "good": self.good}


Accept = Callable[[Outcome], None]


def fault_job(*, steps: int = STEPS, checkpoint_every: int = CHECKPOINT_EVERY) -> MixedJob:
    template = four_tenants(MODEL, steps=steps, encoding="auto")[0]
    spec = template.spec.model_copy(update={"checkpoint_every": checkpoint_every})
    return MixedJob(spec=spec, training=template.training)


async def train_faultless(model: Path, folder: Path, job: MixedJob) -> Faultless:
    settings = service_for(folder, model=model, name=MODEL, dtype="float32")
    async with running_in_process(settings) as (service, _), await tenant_client(service, "alice") as client:
        handle = await client.submit(job.spec, training=job.training)
        await handle.wait(WAIT_SECONDS)
        return Faultless(
            losses=tuple(step.loss for step in await handle.metrics()),
            checkpoint_sha256=(await handle.checkpoints())[-1].sha256,
        )


async def judge(
    handle: AsyncJobHandle,
    faultless: Faultless,
    *,
    part: str,
    case: str,
    faults: Sequence[float],
    data_dir: Path,
    outage_seconds: float = 0.0,
) -> Outcome:
    """The outcome of a job that has ended; `faults` are their moments (seconds since 1970).

    What the fault itself lasts, `outage_seconds`, is no time of recovery.
    """
    events = [event async for event in handle.events(follow=False)]
    recorded = {step.step: step.loss for step in await handle.metrics()}
    wanted = dict(enumerate(faultless.losses, start=1))
    applied = [event for event in events if event.kind == "step.applied"]
    last = (await handle.checkpoints())[-1]
    return Outcome(
        part=part,
        case=case,
        faults=len(faults),
        steps_lost=sum(recorded.get(step) != loss for step, loss in wanted.items()),
        applied_twice=_optimizer_steps(data_dir, handle.job_id, last.version) - len(wanted),
        bit_identical=last.sha256 == faultless.checkpoint_sha256,
        recovery_seconds=round(max((_stall(applied, at) - outage_seconds for at in faults), default=0.0), 2),
        target_seconds=TARGET_SECONDS[part],
        steps_made_again=len(applied) - len({event.data["step"] for event in applied}),
        leases=sum(event.kind == "lease.granted" for event in events),
    )


def _optimizer_steps(data_dir: Path, job_id: str, version: int) -> int:
    """How often the optimizer of the last checkpoint has stepped, as its own state says."""
    (path,) = (data_dir / "objects" / "checkpoints" / job_id).glob(f"{version:08d}-*.safetensors")
    states = decode_checkpoint(path.read_bytes()).optimizer_state.values()
    (steps,) = {int(state[STEP]) for state in states}
    return steps


def _stall(applied: Sequence[Event], fault: float) -> float:
    """Longest time from the fault, or from a step behind it, to the next step."""
    moments = [moment for event in applied if (moment := _seconds(event)) > fault]
    before = [fault, *moments]
    return max((after - start for start, after in zip(before, moments, strict=False)), default=0.0)


def _seconds(event: Event) -> float:
    return datetime.fromisoformat(event.created_at).timestamp()
