"""The states of a job, what can happen to it, and what that makes of it. A terminal state never changes.

`TRANSITIONS` is the whole machine: a state and a trigger that it does not hold are refused, and the store has
no other way into a state.
"""

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


class Trigger(enum.StrEnum):
    """What happens to a job."""

    START = "start"  # its driver begins
    REQUEUE = "requeue"  # the coordinator that drove it has gone
    PAUSE = "pause"  # its tenant stops it, or its own watchdog does
    RESUME = "resume"  # its tenant lets it go on
    COMPLETE = "complete"  # every step is applied
    STOP_EARLY = "stop_early"  # its held-out rows say that it has learnt enough
    FAIL = "fail"  # trying again would give the same error
    CANCEL = "cancel"  # its tenant ends it


INITIAL_STATE = JobState.QUEUED
ACTIVE_STATES = frozenset({JobState.QUEUED, JobState.RUNNING})  # those that a driver works on
TERMINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})

TRANSITIONS: dict[JobState, dict[Trigger, JobState]] = {
    JobState.QUEUED: {
        Trigger.START: JobState.RUNNING,
        Trigger.PAUSE: JobState.PAUSED,
        Trigger.FAIL: JobState.FAILED,
        Trigger.CANCEL: JobState.CANCELLED,
    },
    JobState.RUNNING: {
        Trigger.REQUEUE: JobState.QUEUED,
        Trigger.PAUSE: JobState.PAUSED,
        Trigger.COMPLETE: JobState.SUCCEEDED,
        Trigger.STOP_EARLY: JobState.SUCCEEDED,
        Trigger.FAIL: JobState.FAILED,
        Trigger.CANCEL: JobState.CANCELLED,
    },
    JobState.PAUSED: {
        Trigger.RESUME: JobState.QUEUED,
        Trigger.CANCEL: JobState.CANCELLED,
    },
    JobState.SUCCEEDED: {},
    JobState.FAILED: {},
    JobState.CANCELLED: {},
}


def next_state(before: JobState, trigger: Trigger) -> JobState:
    """The state that `trigger` makes of `before`. Raises Conflict `TRANSITION_ILLEGAL`."""
    possible = TRANSITIONS[before]
    if trigger not in possible:
        allowed = ", ".join(sorted(possible)) or "none: it has ended"
        raise Conflict(
            "TRANSITION_ILLEGAL",
            f"{trigger} is not possible of a job that is {before}; possible: {allowed}",
            actual=before.value,
        )
    return possible[trigger]
