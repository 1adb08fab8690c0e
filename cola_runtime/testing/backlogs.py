"""Fairness over windows of time, among those who had something waiting all the while."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


def jain_index(shares: Sequence[float]) -> float:
    """(sum x)^2 / (n sum x^2): 1 where all shares are equal, 1 / n where one of n has everything.

    There must be one that is not 0. Source: Jain, Chiu, Hawe, "A quantitative measure of fairness", 1984.
    """
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


@dataclass(frozen=True, slots=True, kw_only=True)
class FairWindow:
    """What those tenants got who waited all the time, in tokens over weight."""

    tenants: int
    jain_index: float
    least_over_mean: float
    most_over_mean: float


class Backlogs:
    """Counts what tenants have waiting and what they are served, and judges window after window.

    A tenant counts in a window if it had something waiting at every moment of it: one that did not could
    have got no more, so its share says nothing of fairness. Windows with fewer than two such are left out.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Of tenants 0, 1, ..."""
        self._weights = weights
        self._waiting = [0] * len(weights)  # microbatches
        self._since = [0.0] * len(weights)  # when the tenant began to wait, if it does
        self._served = [0] * len(weights)  # tokens
        self._served_before = [0] * len(weights)  # when the window began
        self._began = 0.0
        self.windows: list[FairWindow] = []

    def wait(self, tenant: int, now: float) -> None:
        """One more of its microbatches waits."""
        if not self._waiting[tenant]:
            self._since[tenant] = now
        self._waiting[tenant] += 1

    def leave(self, tenant: int) -> None:
        """One of them no longer waits."""
        self._waiting[tenant] -= 1

    def serve(self, tenant: int, tokens: int) -> None:
        self._served[tenant] += tokens

    def end_window(self, now: float) -> None:
        """Judge what happened since the last call, or since 0, and begin the next window."""
        shares = [
            (self._served[tenant] - self._served_before[tenant]) / self._weights[tenant]
            for tenant, waiting in enumerate(self._waiting)
            if waiting and self._since[tenant] <= self._began
        ]
        if len(shares) > 1 and any(shares):
            mean = statistics.fmean(shares)
            self.windows.append(
                FairWindow(
                    tenants=len(shares),
                    jain_index=jain_index(shares),
                    least_over_mean=min(shares) / mean,
                    most_over_mean=max(shares) / mean,
                )
            )
        self._began, self._served_before = now, self._served.copy()
