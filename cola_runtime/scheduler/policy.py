"""Who goes into the next base step: a pure function of what waits, the shares and the token budget.

Fairness is a virtual token counter per tenant: every token computed for a tenant adds 1 / weight, and the
tenant with the lowest counter goes first. A tenant that comes back from idleness starts at the lowest
counter among those waiting, so that idleness cannot be saved up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cola_runtime.scheduler.packing import PaddedRow
from cola_runtime.types import Gang

WORTH = 1.25  # beyond this, a base step of its own is cheaper than the padding


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """One microbatch (or part of one) that could go into a base step now."""

    ticket: int  # order of arrival; ties in fairness go to the older one
    tenant_id: str
    job_id: str
    rows: int
    padded: PaddedRow  # what each row costs, padded to the longest
    train: bool  # forward and backward, or forward only: the two never share a base step
    gang: Gang | None = None  # merged weights belong to one gang: a base step has one, or none

    @property
    def tokens(self) -> int:
        """What it costs alone, padding included."""
        return self.rows * self.padded.total


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A tenant's weight and the virtual tokens served so far (tokens / weight)."""

    weight: float = 1.0
    served: float = 0.0


def choose(
    waiting: Iterable[Waiting], *, shares: Mapping[str, Share], token_budget: int
) -> tuple[Waiting, ...]:
    """Pick the members of the next base step: the fairest first, then whoever fits beside it.

    The first is always taken, even above the budget. Another joins only if
    the padding that it brings, on both sides, costs less than WORTH times what it costs alone, and only if it
    is of the first one's gang; the others' turn comes since their counters stay behind. Only a job's
    oldest entry is considered: its microbatches are a sequence, and the last one makes the device step.
    Returns () when nothing waits.
    """
    in_fair_order = sorted(waiting, key=lambda entry: (_served(shares, entry), entry.ticket))
    chosen: list[Waiting] = []
    considered_jobs: set[str] = set()
    rows, padded = 0, PaddedRow()
    for entry in in_fair_order:
        if entry.job_id in considered_jobs or (chosen and not _together(entry, chosen[0])):
            continue
        considered_jobs.add(entry.job_id)
        grown_rows, grown = rows + entry.rows, padded.beside(entry.padded)
        more = grown_rows * grown.total - rows * padded.total
        if chosen and (grown_rows * grown.total > token_budget or more > WORTH * entry.tokens):
            continue
        chosen.append(entry)
        rows, padded = grown_rows, grown
    return tuple(chosen)


def charge(shares: Mapping[str, Share], tokens_by_tenant: Mapping[str, int]) -> dict[str, Share]:
    """Shares after a base step that computed these tokens."""
    charged = dict(shares)
    for tenant_id, tokens in tokens_by_tenant.items():
        share = charged.get(tenant_id, Share())
        charged[tenant_id] = Share(weight=share.weight, served=share.served + tokens / share.weight)
    return charged


def admit(shares: Mapping[str, Share], tenant_id: str, *, active: Iterable[str]) -> dict[str, Share]:
    """Shares with a tenant that starts to wait: its counter rises to the lowest among the active tenants."""
    share = shares.get(tenant_id, Share())
    others = [shares[other].served for other in active if other in shares and other != tenant_id]
    floor = min(others, default=share.served)
    return {**shares, tenant_id: Share(weight=share.weight, served=max(share.served, floor))}


def _together(entry: Waiting, first: Waiting) -> bool:
    return (entry.train, entry.gang) == (first.train, first.gang)


def _served(shares: Mapping[str, Share], entry: Waiting) -> float:
    return shares.get(entry.tenant_id, Share()).served
