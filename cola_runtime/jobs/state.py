"""The states of a job, and which may follow which. A terminal state never changes."""

from __future__ import annotations

import enum

from cola_runtime.errors import Conflict


class JobState(enum.StrEnum):
    """Where a job stands."""

    QUEUED = "queued"  # accepted, waits for a device or a base model
    RUNNING = "running"  # holds a lease or is about to get one
    PAUSED = "paused"  # its tenant stopped it and can resume it
    SUCCEEDED = "succeeded"  # every step applied, or stopped early; the last checkpoint made
    FAILED = "failed"  # ended by an error; failure_reason says which
    CANCELLED = "cancelled"  # ended by its tenant; checkpoints stay


TERMINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.PAUSED, JobState.FAILED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset(
        {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.PAUSED, JobState.QUEUED}
    ),  # back to queued: the coordinator restarted
    JobState.PAUSED: frozenset({JobState.QUEUED, JobState.RUNNING, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


def check_transition(before: JobState, after: JobState) -> None:
    """Raise Conflict `TRANSITION_ILLEGAL` unless `after` may follow `before`; no state follows itself."""
    if after not in TRANSITIONS[before]:
        allowed = ", ".join(sorted(TRANSITIONS[before])) or "none: it has ended"
        raise Conflict(
            "TRANSITION_ILLEGAL",
            f"a job that is {before} cannot become {after}; possible: {allowed}",
            actual=before.value,
        )
