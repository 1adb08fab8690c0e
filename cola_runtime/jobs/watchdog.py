"""Tells when a job's loss has gone astray. Pure: it knows losses, and nothing of what follows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cola_runtime.spec import WatchdogSpec

FIRST_STEPS = 10  # their highest loss is what later ones are compared with


def losses_needed(spec: WatchdogSpec, version: int) -> tuple[range, range]:
    """Which steps' losses `diverged` looks at once `version` steps are recorded: the first and the latest."""
    latest = max(FIRST_STEPS, version - spec.patience) + 1
    return range(1, min(FIRST_STEPS, version) + 1), range(latest, version + 1)


def not_finite(step: int, loss: float) -> str:
    """What is wrong with this one loss; empty if nothing."""
    return "" if math.isfinite(loss) else f"the loss of step {step} is {loss}"


def diverged(spec: WatchdogSpec, first: Sequence[float], latest: Sequence[float]) -> str:
    """What is wrong with the losses of `losses_needed`; empty if nothing."""
    if spec.loss_factor is None or len(latest) < spec.patience:
        return ""
    limit = spec.loss_factor * max(first)
    if min(latest) <= limit:
        return ""
    return (
        f"the loss was {min(latest):.4g} or more for {spec.patience} steps, above {spec.loss_factor:g} times "
        f"the highest of the first {len(first)} steps ({max(first):.4g})"
    )
