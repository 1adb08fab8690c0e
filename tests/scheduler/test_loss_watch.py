"""A loss that is no number ends its job before it is recorded."""

from __future__ import annotations

import math
from typing import cast

import pytest

from cola_runtime.jobs.store import JobStore
from cola_runtime.reasons import REASONS
from cola_runtime.scheduler.loss_watch import FATAL, Diverged, LossWatch
from cola_runtime.spec import WatchdogSpec


def test_a_loss_that_is_no_number_ends_its_job_with_a_reason_and_what_to_do() -> None:
    watch = LossWatch("job", WatchdogSpec(), cast(JobStore, None))  # what is not recorded is not looked up
    watch.check(3, 2.5)
    with pytest.raises(Diverged) as caught:
        watch.check(4, math.nan)
    assert caught.value.reason == "LOSS_NOT_FINITE"
    assert caught.value.reason in FATAL
    assert all(REASONS[reason].remedy for reason in FATAL)
