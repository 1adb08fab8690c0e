"""The learning rate as a pure function of the step. Torch-free."""

from __future__ import annotations

import math

from cola_runtime.errors import InvalidInput
from cola_runtime.types import LearningRateSchedule


def learning_rate(schedule: LearningRateSchedule, base: float, step: int) -> float:
    """The rate that step `step` (0-based) is applied with; w = warmup_steps, T = total_steps.

        step < w     base (step + 1) / w
        constant     base
        linear       base (T - step) / (T - w)
        cosine       base (1 + cos(pi (step - w) / (T - w))) / 2

    and 0 from step T on, but for `constant`. Differs from transformers' get_*_schedule_with_warmup in the
    warm-up: theirs is step / w, which spends step 0 on a rate of zero and reaches `base` at step w, not at
    w - 1; and after T, where their cosine would rise again. Raises InvalidInput for another kind.
    """
    if step < schedule.warmup_steps:
        return base * (step + 1) / schedule.warmup_steps
    return base * _decay(schedule, step)


def _decay(schedule: LearningRateSchedule, step: int) -> float:
    if schedule.kind == "constant":
        return 1.0
    span = schedule.total_steps - schedule.warmup_steps
    left = max(0, schedule.total_steps - step)
    if schedule.kind == "linear":
        return left / span if left else 0.0
    if schedule.kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * (1.0 - left / span))) if left else 0.0
    raise InvalidInput(
        "SCHEDULE_UNKNOWN",
        f"learning rate schedule {schedule.kind!r} is unknown",
        remedy="Use constant, linear or cosine.",
    )
