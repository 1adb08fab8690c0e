"""What must hold of one job whatever happens to the service, by its events and its records. Pure.

Each broken rule is a sentence in `violations`; a soak whose ledgers have none kept every step exactly once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from cola_runtime.client.values import ENDED_STATES, Event, Job, Step
from cola_runtime.testing.soak_jobs import Expected, SoakJob

PROGRESS = frozenset({"step.applied", "evaluation.done"})
SETTLE_SECONDS = 2.0
_OF_A_RUN = frozenset({"step.applied", "evaluation.done", "lease.granted", "job.rewound", "checkpoint.made"})


@dataclass(slots=True)
class JobLedger:
    """One job, replayed from its events in order."""

    job_id: str
    kind: SoakJob
    violations: list[str] = field(default_factory=list)
    last_event: int = 0
    state: str = "queued"
    version: int = 0
    epoch: int = 0
    leases: int = 0
    steps_seen: int = 0  # with those made again
    moments: list[float] = field(default_factory=list)  # of progress, seconds since 1970
    final: bool = False  # its end was checked

    @property
    def ended(self) -> bool:
        return self.state in ENDED_STATES

    @property
    def active(self) -> bool:
        """It should make progress."""
        return self.state in ("queued", "running")

    def stall_since(self, moment: float) -> float | None:
        """The longest time without progress from the moment on; None before it has clearly gone on.

        What was under way at the moment is no sign of that, so progress must come SETTLE_SECONDS behind it.
        """
        later = [at for at in self.moments if at > moment]
        until = next((n for n, at in enumerate(later, start=1) if at > moment + SETTLE_SECONDS), None)
        if until is None:
            return None
        return max(after - before for before, after in itertools.pairwise([moment, *later[:until]]))

    def hear(self, event: Event) -> None:
        if event.id <= self.last_event:
            self._wrong(f"event {event.id} came again")
            return
        self.last_event = event.id
        if self.ended and (event.kind in _OF_A_RUN or event.kind == f"job.{self.state}"):
            self._wrong(f"{event.kind} behind its end, {self.state}")
        if event.kind in PROGRESS:
            self.moments.append(datetime.fromisoformat(event.created_at).timestamp())
        if event.kind == "lease.granted":
            self._lease(int(event.data["epoch"]))
        elif event.kind == "step.applied":
            self._step(int(event.data["step"]), int(event.data["epoch"]))
        elif event.kind == "job.rewound":
            self._rewind(int(event.data["from"]), int(event.data["to"]), int(event.data["epoch"]))
        elif event.kind.startswith("job.") and "to" in event.data:
            self._move(str(event.data["to"]))

    def _lease(self, epoch: int) -> None:
        if epoch <= self.epoch:
            self._wrong(f"epoch {epoch} was granted behind epoch {self.epoch}")
        self.epoch, self.leases = epoch, self.leases + 1

    def _step(self, step: int, epoch: int) -> None:
        if step != self.version + 1:
            self._wrong(f"step {step} was applied behind step {self.version}")
        if epoch != self.epoch:
            self._wrong(f"step {step} was applied under epoch {epoch}; the lease is of epoch {self.epoch}")
        self.version, self.steps_seen = step, self.steps_seen + 1

    def _rewind(self, before: int, to: int, epoch: int) -> None:
        if before != self.version or not 0 <= to < before or epoch != self.epoch:
            self._wrong(f"rewound from {before} to {to} under epoch {epoch}, at {self.version}, {self.epoch}")
        self.version = to

    def _move(self, state: str) -> None:
        if self.ended and state != self.state:
            self._wrong(f"it was {self.state} and became {state}")
        self.state = state

    def see(self, job: Job) -> None:
        """How the service says that it stands, asked after the events so far: an end is one for good."""
        if self.ended and job.state != self.state:
            self._wrong(f"it was {self.state} and is said to be {job.state}")
        if job.state == "failed":
            self._wrong(f"it failed: {job.failure_reason}: {job.failure_message}")

    def check_record(self, steps: Sequence[Step]) -> None:
        """Recorded steps are 1, 2, 3, ..., and epochs never fall."""
        numbers = [step.step for step in steps]
        if numbers != list(range(1, len(numbers) + 1)):
            self._wrong(f"the recorded steps are {numbers}")
        epochs = [step.epoch for step in steps]
        if epochs != sorted(epochs):
            self._wrong(f"the recorded steps' epochs are {epochs}")

    def check_account(self, job: Job, steps: Sequence[Step]) -> None:
        """At its end: the totals are those of the recorded steps, and of the steps that events tell of."""
        self.check_record(steps)
        tokens = sum(step.tokens for step in steps)
        if job.tokens != tokens or job.version != len(steps):
            told = f"{job.tokens} tokens in {job.version} steps"
            self._wrong(f"it says {told}, its record {tokens} in {len(steps)}")
        if job.version != self.version or job.repeated_steps != self.steps_seen - self.version:
            events = f"{self.version} steps and {self.steps_seen - self.version} repeated"
            self._wrong(f"it says {job.version} steps and {job.repeated_steps} repeated, its events {events}")

    def check_completed(self, job: Job, steps: Sequence[Step], expected: Expected) -> None:
        """A job that succeeded has exactly its steps and tokens; a fixed one the very losses, too."""
        if len(steps) != len(expected.losses):
            self._wrong(f"it completed with {len(steps)} of {len(expected.losses)} steps")
        if job.tokens != expected.tokens:
            self._wrong(f"it trained on {job.tokens} tokens instead of {expected.tokens}")
        if self.kind.fixed and tuple(step.loss for step in steps) != expected.losses:
            self._wrong("its losses are not those of the run without faults")

    def _wrong(self, what: str) -> None:
        self.violations.append(f"{self.job_id} ({self.kind.name}): {what}")
