"""Adapters go where they are through first, where they fit; a move must be worth it."""

from __future__ import annotations

import random
from dataclasses import replace

from cola_runtime.device.session import AdapterSession
from cola_runtime.job_choices import TrustClass
from cola_runtime.jobs.plan import TrainingPlan
from cola_runtime.scheduler.placement import LEAST_GAIN, Demand, Move, Offer, place, rebalance
from cola_runtime.types import LearningRateSchedule, OptimizerHyperparameters
from tests.device.adapter_samples import definition

SMALL = Demand(numbers=1 << 20, memory_bytes=20 << 20)
BIG = Demand(numbers=4 << 20, memory_bytes=80 << 20)


def offer(order: int, *, speed: float = 2.0**27, free: int = 1 << 30, **jobs: Demand) -> Offer:
    return Offer(device_id=f"d{order}", order=order, speed=speed, memory_bytes=free, jobs=jobs)


def test_equal_devices_get_one_adapter_after_the_other() -> None:
    offers = [offer(0), offer(1), offer(2)]
    chosen = []
    for job in range(6):
        (device_id,) = place(f"j{job}", SMALL, offers, 1)
        chosen.append(device_id)
        offers = [o.having(f"j{job}", SMALL) if o.device_id == device_id else o for o in offers]
    assert chosen == ["d0", "d1", "d2"] * 2


def test_a_device_that_is_four_times_as_fast_gets_four_of_five() -> None:
    offers = [offer(0), offer(1, speed=2.0**29)]
    for job in range(10):
        (device_id,) = place(f"j{job}", SMALL, offers, 1)
        offers = [o.having(f"j{job}", SMALL) if o.device_id == device_id else o for o in offers]
    assert [len(o.jobs) for o in offers] == [2, 8]


def test_a_few_percent_in_a_trial_do_not_matter() -> None:
    offers = [offer(0, speed=1.9 * 2**27), offer(1, speed=2.2 * 2**27, a=SMALL)]
    assert place("j", SMALL, offers, 1) == ["d0"]


def test_large_adapters_count_for_more_than_many_small_ones() -> None:
    assert place("j", SMALL, [offer(0, a=BIG), offer(1, a=SMALL, b=SMALL)], 1) == ["d1"]


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    full, roomy = offer(0, free=79 << 20), offer(1, free=81 << 20, a=BIG)
    assert place("j", BIG, [full, roomy], 1) == ["d1"]
    assert place("j", BIG, [full], 1) == []
    assert place("j", BIG, [full, roomy], 2) == []
    assert full.refusal(BIG).startswith("DEVICE_MEMORY")
    assert "80 MiB" in full.refusal(BIG)
    assert "79 MiB" in full.refusal(BIG)
    assert not roomy.refusal(BIG)


def test_a_job_goes_and_moves_only_to_devices_that_may_see_what_it_sends() -> None:
    fast = replace(offer(1, speed=2.0**30), trust=TrustClass.COMMUNITY)
    assert place("j", SMALL, [offer(0, a=BIG), fast], 1) == ["d0"]
    assert place("j", SMALL, [offer(0), fast], 2) == []
    assert "trust trusted only, and this one is community" in fast.refusal(SMALL)
    assert rebalance([offer(0, a=SMALL, b=SMALL), fast], frozenset("ab")) is None
    open_to_all = replace(SMALL, trust=frozenset(TrustClass))
    assert place("j", open_to_all, [offer(0, a=BIG), fast], 1) == ["d1"]
    assert rebalance([offer(0, a=SMALL, b=open_to_all), fast], frozenset("ab")) is not None


def test_the_shards_of_an_adapter_go_to_different_devices() -> None:
    assert place("j", SMALL, [offer(0, a=SMALL), offer(1), offer(2)], 2) == ["d1", "d2"]


def test_a_device_that_joins_takes_a_job_of_the_busiest_one() -> None:
    offers = [offer(0, a=SMALL, b=SMALL), offer(1, c=SMALL, d=SMALL, e=SMALL), offer(2)]
    assert rebalance(offers, frozenset("abcde")) == Move(job_id="c", source="d1", target="d2")
    assert rebalance(offers, frozenset("abde")) == Move(job_id="d", source="d1", target="d2")
    assert rebalance(offers, frozenset("a")) is None


def test_a_move_between_nearly_equal_devices_is_not_worth_it() -> None:
    assert rebalance([offer(0, a=SMALL), offer(1, b=SMALL, c=SMALL)], frozenset("abc")) is None
    assert rebalance([offer(0, a=BIG), offer(1)], frozenset("a")) is None
    assert rebalance([offer(0, a=SMALL, b=SMALL), offer(1, free=0)], frozenset("ab")) is None


def test_moves_end_and_each_shortens_the_longer_round_by_the_least_gain() -> None:
    draw = random.Random(3)
    for _ in range(200):
        demands = {
            f"j{n}": Demand(numbers=draw.randint(1, 100) << 14, memory_bytes=draw.randint(1, 100))
            for n in range(draw.randint(1, 12))
        }
        offers = [offer(n, speed=2.0 ** draw.randint(24, 28), free=2000) for n in range(draw.randint(1, 5))]
        for job_id, demand in demands.items():
            at = draw.randrange(len(offers))
            offers[at] = offers[at].having(job_id, demand)
        for _ in range(60):
            move = rebalance(offers, frozenset(demands))
            if move is None:
                break
            longer = _longer_round(offers, move)
            assert longer == max(o.round_seconds for o in offers)
            offers = [_after(o, move, demands[move.job_id]) for o in offers]
            assert _longer_round(offers, move) <= (1 - LEAST_GAIN) * longer * (1 + 1e-9)
        else:
            raise AssertionError("still moving")
        assert sorted(job for o in offers for job in o.jobs) == sorted(demands)


def _longer_round(offers: list[Offer], move: Move) -> float:
    return max(o.round_seconds for o in offers if o.device_id in (move.source, move.target))


def _after(before: Offer, move: Move, demand: Demand) -> Offer:
    if before.device_id == move.source:
        return before.without(move.job_id)
    return before.having(move.job_id, demand) if before.device_id == move.target else before


def test_a_plans_demand_is_what_a_session_of_it_holds_and_the_weights_on_their_way() -> None:
    training = definition()
    session = AdapterSession.create(training)
    numbers = session.weights_vector.numel()
    plan = TrainingPlan(
        adapter=training.spec,
        optimizer=OptimizerHyperparameters(kind="adamw", learning_rate=0.1),
        schedule=LearningRateSchedule(kind="constant", warmup_steps=0, total_steps=1),
        checkpoint_every=1,
        max_staleness=0,
    )
    demand = Demand.of(plan)
    assert demand.numbers == numbers
    assert demand.memory_bytes == session.resident_bytes + 4 * numbers
