import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from cola_runtime.adapters.schedule import learning_rate
from cola_runtime.errors import InvalidInput
from cola_runtime.types import LearningRateSchedule

BASE = 2e-3
THEIRS = {
    "linear": lambda optimizer, w, t: get_linear_schedule_with_warmup(optimizer, w, t),
    "cosine": lambda optimizer, w, t: get_cosine_schedule_with_warmup(optimizer, w, t),
    "constant": lambda optimizer, w, t: get_constant_schedule_with_warmup(optimizer, w),
}


def make_schedule(kind="linear", warmup=0, total=20):
    return LearningRateSchedule(kind=kind, warmup_steps=warmup, total_steps=total)


def rates_of(scheduler, optimizer, steps):
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def sgd():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)


@pytest.mark.parametrize("kind", list(THEIRS))
@pytest.mark.parametrize("warmup", [0, 5])
def test_after_the_warm_up_rates_are_those_of_transformers(kind, warmup):
    optimizer = sgd()
    theirs = rates_of(THEIRS[kind](optimizer, warmup, 20), optimizer, 21)
    ours = [learning_rate(make_schedule(kind, warmup), BASE, step) for step in range(21)]
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("kind", list(THEIRS))
def test_warm_up_is_one_step_ahead_of_transformers_and_starts_above_zero(kind):
    optimizer = sgd()
    theirs = rates_of(THEIRS[kind](optimizer, 5, 20), optimizer, 6)
    ours = [learning_rate(make_schedule(kind, 5), BASE, step) for step in range(5)]
    assert theirs[0] == 0.0
    assert ours == pytest.approx(theirs[1:6], rel=1e-12)
    assert ours[0] == pytest.approx(BASE / 5)


def test_equals_a_torch_scheduler_of_the_stated_formula():
    optimizer = sgd()
    formula = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (k + 1) / 4 if k < 4 else (20 - k) / 16)
    ours = [learning_rate(make_schedule("linear", 4), BASE, step) for step in range(20)]
    assert ours == pytest.approx(rates_of(formula, optimizer, 20), rel=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decay_ends_at_zero_and_stays_there(kind):
    for schedule in (make_schedule(kind), make_schedule(kind, warmup=20), make_schedule(kind, warmup=30)):
        end = max(schedule.total_steps, schedule.warmup_steps)
        assert [learning_rate(schedule, BASE, end + extra) for extra in (0, 1, 100)] == [0.0, 0.0, 0.0]


def test_constant_never_ends():
    assert learning_rate(make_schedule("constant", 2), BASE, 10**6) == BASE


def test_an_unknown_kind_is_refused():
    with pytest.raises(InvalidInput, match="'stairs' is unknown"):
        learning_rate(make_schedule("stairs"), BASE, 0)
