"""How long a base step takes, and how much of what waits should go into the next one. Pure.

A job whose step was computed is with its device for a while. If all jobs but one come back together, a
base model that takes whatever waits computes a large step, then small ones until the large one's jobs are
back, and so on for good; each small one costs what a base step costs whatever is in it. Dealt out evenly, one
half is computed while the other half is with its devices.
"""

from __future__ import annotations

import math

FORGETTING = 0.9  # weight of what was known, when another base step or turnaround has been seen
LEAST_SPREAD = 0.1  # of base steps' tokens, over their mean: below, the fixed cost cannot be told
LATEST = 2.0  # turnarounds after which a job is not expected back any more


class StepTimes:
    """Seconds of a base step by its computed tokens: a fixed cost and one per token, of the last ten."""

    def __init__(self) -> None:
        self._count = self._tokens = self._seconds = self._squares = self._products = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self._count = FORGETTING * self._count + 1.0
        self._tokens = FORGETTING * self._tokens + tokens
        self._seconds = FORGETTING * self._seconds + seconds
        self._squares = FORGETTING * self._squares + tokens * tokens
        self._products = FORGETTING * self._products + tokens * seconds

    def of(self, tokens: float) -> float:
        """By least squares; 0 before the first step."""
        if not self._count:
            return 0.0
        mean_tokens, mean_seconds = self._tokens / self._count, self._seconds / self._count
        spread = self._squares / self._count - mean_tokens**2
        per_token = mean_seconds / max(1.0, mean_tokens)
        if spread > (LEAST_SPREAD * mean_tokens) ** 2:
            slope = (self._products / self._count - mean_tokens * mean_seconds) / spread
            per_token = min(max(slope, 0.0), per_token)  # neither cost is below 0
        return mean_seconds + per_token * (tokens - mean_tokens)


class EvenSteps:
    """Told where every microbatch that trains is: it waits, it is computed, then its job is with its device.

    Tokens are computed ones, padding included. O(1) each.
    """

    def __init__(self) -> None:
        self.times = StepTimes()
        self._waiting: dict[str, int] = {}  # by job, tokens
        self._away: dict[str, tuple[float, int]] = {}  # by job, since when, and tokens; the earliest first
        self._tokens = 0  # of all that wait, are computed or are away
        self._waiting_tokens = 0
        self._turnaround: float | None = None

    def waits(self, job_id: str, tokens: int, *, now: float) -> None:
        since, away_tokens = self._away.pop(job_id, (None, 0))
        if since is not None:
            before = now - since if self._turnaround is None else self._turnaround
            self._turnaround = FORGETTING * before + (1.0 - FORGETTING) * (now - since)
        self._waiting[job_id] = self._waiting.get(job_id, 0) + tokens
        self._waiting_tokens += tokens
        self._tokens += tokens - away_tokens

    def stops_waiting(self, job_id: str, tokens: int, *, computed: bool) -> None:
        """It goes into a base step, or is taken back."""
        left = self._waiting.pop(job_id) - tokens
        if left:
            self._waiting[job_id] = left
        self._waiting_tokens -= tokens
        self._tokens -= 0 if computed else tokens

    def ends(self, job_id: str, tokens: int, *, now: float, away: bool) -> None:
        """Its base step has ended; `away`: now it is with its device."""
        if not away or job_id in self._waiting:  # where more of its step waits, that comes first
            self._tokens -= tokens
            return
        _, before = self._away.pop(job_id, (0.0, 0))
        self._away[job_id] = (now, before + tokens)

    def forget(self, job_id: str) -> None:
        """The job is not expected back."""
        self._tokens -= self._away.pop(job_id, (0.0, 0))[1]

    def room(self, *, now: float) -> float:
        """Computed tokens of the next base step: half of all that waits, is being computed or is away.

        Where jobs are away for longer than such a step takes, the share of it that is in base steps when
        these always run. No bound before the first job has come back.
        """
        if self._turnaround is None or not self._waiting:
            return math.inf
        while self._away:
            job_id, (since, _) = next(iter(self._away.items()))
            if since >= now - LATEST * self._turnaround:
                break
            self.forget(job_id)
        step_seconds = self.times.of(self._tokens / 2)
        share = min(0.5, step_seconds / max(step_seconds + self._turnaround, 1e-9))
        return share * self._tokens + 0.5 * self._waiting_tokens / len(self._waiting)
