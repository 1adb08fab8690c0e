"""A loss that is not finite, or stays far above where it began, is told; anything else is not."""

from __future__ import annotations

import math

import pytest

from cola_runtime.jobs.watchdog import diverged, losses_needed, not_finite
from cola_runtime.spec import WatchdogSpec

SPEC = WatchdogSpec(loss_factor=2.0, patience=3)
CALM = [4.0, 3.5, 3.0, 2.8, 2.6, 2.5, 2.4, 2.3, 2.2, 2.1]


def acts_at(losses: list[float], spec: WatchdogSpec = SPEC) -> int | None:
    """The first version at which the watchdog acts."""
    for version in range(1, len(losses) + 1):
        first, latest = ([losses[step - 1] for step in each] for each in losses_needed(spec, version))
        if diverged(spec, first, latest):
            return version
    return None


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_told(loss: float) -> None:
    assert not_finite(7, loss) == f"the loss of step 7 is {loss}"
    assert not_finite(7, 1e30) == ""


def test_exploded_losses_in_a_row_are_told() -> None:
    assert acts_at([*CALM, 9.0, 9.0, 8.1, 9.0]) == 13


@pytest.mark.parametrize(
    "later", [[9.0, 9.0], [9.0, 9.0, 7.9, 9.0, 9.0, 7.0], [8.0, 8.0, 8.0], [2.0] * 50], ids=str
)
def test_too_few_or_too_small_ones_are_not(later: list[float]) -> None:
    assert acts_at([*CALM, *later]) is None


def test_the_first_steps_are_not_judged_by_themselves() -> None:
    assert acts_at([0.1, 50.0, 60.0, 70.0, 80.0]) is None


def test_no_factor_is_no_explosion() -> None:
    assert acts_at([*CALM, 1e30, 1e30, 1e30], WatchdogSpec(loss_factor=None)) is None


def test_only_the_losses_that_matter_are_asked_for() -> None:
    assert losses_needed(SPEC, 5) == (range(1, 6), range(11, 6))
    assert losses_needed(SPEC, 1000) == (range(1, 11), range(998, 1001))
