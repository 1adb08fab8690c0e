"""The fair queue: what it promises, over random histories, and that it is the sorted one made incremental."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from plain_queue import PlainQueue

from cola_runtime.job_choices import Priority
from cola_runtime.scheduler.ordered import SortedKeys
from cola_runtime.scheduler.packing import PaddedRow
from cola_runtime.scheduler.policy import LEAD, FairQueue
from cola_runtime.scheduler.waiting import Due, Share, Waiting, padded_tokens
from cola_runtime.types import Gang

GANGS = [None, Gang(name="group/one", combine="mean"), Gang(name="group/two", combine="mean")]
LONGEST = 60
LARGEST = 6 * LONGEST  # tokens of a microbatch


def waiting(ticket: int, tenant: str, *lengths: int, job: str = "", **fields: Any) -> Waiting:
    lengths = lengths or (10,)
    return Waiting(
        ticket=ticket,
        tenant_id=tenant,
        job_id=job or tenant,
        rows=len(lengths),
        tokens=sum(lengths),
        padded=fields.pop("padded", PaddedRow(max(lengths))),
        train=fields.pop("train", True),
        **fields,
    )


def queue_of(*entries: Waiting, **shares: Share) -> FairQueue:
    queue = FairQueue()
    for tenant, share in shares.items():
        queue.set_share(tenant, share)
    for entry in entries:
        queue.add(entry, now=0.0)
    return queue


def step(queue: FairQueue, budget: int, *, now: float = 0.0) -> tuple[Waiting, ...]:
    chosen = queue.choose(token_budget=budget, now=now)
    if chosen:
        queue.take(chosen, now=now)
    return chosen


def tickets(chosen: tuple[Waiting, ...]) -> list[int]:
    return sorted(waiting.ticket for waiting in chosen)


# Random histories

LENGTHS = st.lists(st.integers(1, LONGEST), min_size=1, max_size=6).map(tuple)
SHARES = st.lists(
    st.builds(
        Share,
        weight=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
        tokens_per_minute=st.none() | st.none() | st.just(600),
    ),
    min_size=6,
    max_size=6,
)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([4, 80]), SHARES, st.sampled_from([30, 100, 400]))
def test_decisions_are_those_of_the_plain_sorted_queue(
    seed: int, tenants: int, shares: list[Share], budget: int
) -> None:
    fast, plain, drawn = FairQueue(), PlainQueue(), Random(seed)
    for number in range(tenants):
        for queue in (fast, plain):
            queue.set_share(f"t{number}", shares[number % len(shares)])
    for now in range(250):
        event = drawn.random()
        if event < 0.65:
            entry = random_entry(now, f"t{drawn.randrange(tenants)}", drawn)
            fast.add(entry, now=now)
            plain.add(entry, now=now)
        elif event < 0.7:
            ticket = drawn.randrange(now + 1)
            fast.remove(ticket, now=now)
            plain.remove(ticket, now=now)
        elif event < 0.8:
            tenant, tokens = f"t{drawn.randrange(tenants)}", drawn.randrange(200)
            fast.charge(tenant, tokens, now=now)
            plain.charge(tenant, tokens, now=now)
        else:
            chosen = fast.choose(token_budget=budget, now=now)
            assert chosen == plain.choose(token_budget=budget, now=now)
            if chosen:
                fast.take(chosen, now=now)
                plain.take(chosen, now=now)


def random_entry(ticket: int, tenant: str, drawn: Random) -> Waiting:
    return waiting(
        ticket,
        tenant,
        *(drawn.randint(1, LONGEST) for _ in range(drawn.randint(1, 6))),
        job=f"j{drawn.randrange(4)}",
        train=drawn.random() < 0.8,
        gang=drawn.choice([None, None, None, *GANGS]),
        priority=drawn.choice(list(Priority)),
        due=random_due(ticket, drawn),
    )


def random_due(now: int, drawn: Random) -> Due | None:
    """None, in danger already, or so while it waits; deadlines of several jobs may be equal."""
    if drawn.random() < 0.5:
        return None
    return Due(deadline=now + drawn.randrange(0, 60, 20), latest_start=now + drawn.randrange(-20, 40))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), LENGTHS, st.sampled_from(GANGS), st.booleans()), min_size=1),
    st.integers(1, 300),
)
def test_every_microbatch_goes_whole_and_once_within_the_budget_and_with_its_own_class_only(
    entries: list[Any], budget: int
) -> None:
    by_ticket = {
        n: waiting(n, f"t{tenant}", *lengths, job=f"j{n}", gang=gang, train=train)
        for n, (tenant, lengths, gang, train) in enumerate(entries)
    }
    queue, gone = queue_of(*by_ticket.values()), Counter[int]()
    while chosen := step(queue, budget):
        assert padded_tokens(chosen) <= budget or len(chosen) == 1
        assert len({entry.of_class for entry in chosen}) == 1
        gone.update(tickets(chosen))
    assert gone == Counter(dict.fromkeys(by_ticket, 1))
    assert len(queue) == 0


TENANTS = st.lists(
    st.tuples(
        st.sampled_from([0.5, 1.0, 2.0, 4.0]),  # weight
        st.lists(st.integers(1, LONGEST), min_size=1, max_size=6).map(tuple),  # every microbatch of it
        st.integers(1, 3),  # jobs
        st.sampled_from(GANGS),
    ),
    min_size=2,
    max_size=6,
)


@settings(max_examples=30, deadline=None)
@given(TENANTS, st.sampled_from([20, 100, 400]))
def test_tenants_that_always_wait_stay_within_the_stated_distance(tenants: list[Any], budget: int) -> None:
    """(served_j / w_j - served_i / w_i) * w_j <= LEAD * budget + one microbatch, after every base step."""
    weights = {f"t{n}": tenant[0] for n, tenant in enumerate(tenants)}
    queue = queue_of(**{name: Share(weight=weight) for name, weight in weights.items()})
    served = dict.fromkeys(weights, 0.0)
    ticket = 0
    owner = {}

    def refill() -> None:
        """Two microbatches of each job, so that none runs dry within a step."""
        nonlocal ticket
        have = Counter(owner[t] for t in owner if t in queue)
        for n, (_, lengths, jobs, gang) in enumerate(tenants):
            for job in range(jobs):
                for _ in range(have[n, job], 2):
                    queue.add(waiting(ticket, f"t{n}", *lengths, job=f"t{n}-{job}", gang=gang), now=0.0)
                    owner[ticket] = (n, job)
                    ticket += 1

    for _ in range(40):
        refill()
        chosen = step(queue, budget)
        assert chosen
        for entry in chosen:
            served[entry.tenant_id] += entry.tokens / weights[entry.tenant_id]
        for name, weight in weights.items():
            ahead = (served[name] - min(served.values())) * weight
            assert ahead <= LEAD * budget + LARGEST + 1e-6


@settings(max_examples=50, deadline=None)
@given(TENANTS, st.lists(st.integers(0, 5), min_size=1, max_size=200), st.sampled_from([20, 100, 400]))
def test_nobody_who_waits_is_overtaken_by_more_than_the_stated_tokens(
    tenants: list[Any], arrivals: list[int], budget: int
) -> None:
    """While i waits, j gets at most (w_j / w_i) * (B + 2 m) + LEAD * B + m: B the budget, m a microbatch."""
    weights = {f"t{n}": tenant[0] for n, tenant in enumerate(tenants)}
    queue = queue_of(**{name: Share(weight=weight) for name, weight in weights.items()})
    owner: dict[int, str] = {}
    overtaken: dict[str, Counter[str]] = defaultdict(Counter)  # who waits -> whom it saw served
    for ticket, number in enumerate(arrivals):
        number %= len(tenants)
        _, lengths, jobs, gang = tenants[number]
        owner[ticket] = f"t{number}"
        job = f"t{number}-{ticket % jobs}"
        queue.add(waiting(ticket, f"t{number}", *lengths, job=job, gang=gang), now=0.0)
        chosen = step(queue, budget) if ticket % 2 else ()
        waits = {owner[t] for t in owner if t in queue}
        tokens = Counter[str]()
        for entry in chosen:
            tokens[entry.tenant_id] += entry.tokens
        for name in waits:
            if tokens[name] or name not in overtaken:
                overtaken[name] = Counter()
            else:
                overtaken[name].update(tokens)
            for other, count in overtaken[name].items():
                ratio = weights[other] / weights[name]
                assert count <= ratio * (budget + 2 * LARGEST) + LEAD * budget + LARGEST + 1e-6
        overtaken = defaultdict(Counter, {name: overtaken[name] for name in waits})


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3000)), max_size=3000))
@settings(max_examples=20, deadline=None)
def test_sorted_keys_are_a_sorted_set(changes: list[tuple[bool, int]]) -> None:
    keys: SortedKeys[tuple[int]] = SortedKeys()
    expected: set[tuple[int]] = set()
    for number in range(1500):
        keys.add((2 * number,))
        expected.add((2 * number,))
    for add, number in changes:
        if add and (number,) not in expected:
            keys.add((number,))
            expected.add((number,))
        elif not add and (number,) in expected:
            keys.remove((number,))
            expected.remove((number,))
    assert list(keys) == sorted(expected)
    assert len(keys) == len(expected)
    for place, key in enumerate(sorted(expected)[::97]):
        assert keys.index(key) == 97 * place


# What the order is


def test_the_least_served_tenant_goes_first() -> None:
    queue = queue_of(waiting(1, "a"), waiting(2, "b"), waiting(3, "a", job="a2"))
    assert [tickets(step(queue, 10)) for _ in range(3)] == [[1], [2], [3]]


def test_weight_two_is_served_twice_the_tokens() -> None:
    queue = queue_of(b=Share(weight=2.0))
    served = Counter[str]()
    for turn in range(300):
        for tenant in "ab":
            if 2 * turn + (tenant == "b") >= 0:
                queue.add(waiting(2 * turn + (tenant == "b"), tenant), now=0.0)
        for entry in step(queue, 10):
            served[entry.tenant_id] += entry.tokens
    assert served["b"] == 2 * served["a"]


def test_idleness_cannot_be_saved_up() -> None:
    queue = queue_of(*(waiting(n, "a", job=f"j{n}") for n in range(100)))
    for _ in range(50):
        step(queue, 10)
    for n in range(50):
        queue.add(waiting(100 + n, "late"), now=0.0)
    turns = ["late" if tickets(step(queue, 10))[0] >= 100 else "a" for _ in range(20)]
    assert turns.count("late") == 10


def test_later_microbatches_of_a_job_never_overtake_its_first() -> None:
    """The last microbatch makes the device step, so order within a job is part of exactness."""
    queue = queue_of(waiting(1, "b"), waiting(2, "a", 90), waiting(3, "a", 10))
    assert [tickets(step(queue, 40)) for _ in range(3)] == [[1], [2], [3]]


def test_microbatches_of_near_length_share_a_base_step_and_far_ones_do_not_pad_each_other() -> None:
    entries = [waiting(1, "a", *[20] * 8), waiting(2, "b", 100, 100), waiting(3, "c", *[22] * 8)]
    queue = queue_of(*entries)
    assert [tickets(step(queue, 10_000)) for _ in range(2)] == [[1, 3], [2]]


def test_the_first_in_fair_order_goes_above_the_budget_and_alone() -> None:
    queue = queue_of(waiting(1, "a", 500), waiting(2, "b", 480))
    assert [tickets(step(queue, 100)) for _ in range(2)] == [[1], [2]]


def test_a_microbatch_within_the_budget_is_never_cut() -> None:
    queue = queue_of(waiting(1, "a", 10, 10, 10), waiting(2, "b", 10, 10, 10))
    assert [tickets(step(queue, 50)) for _ in range(2)] == [[1], [2]]


def test_a_long_source_and_a_long_target_do_not_pad_each_other() -> None:
    long_source = waiting(1, "a", *[32] * 4, padded=PaddedRow(2, 30))
    long_target = waiting(2, "b", *[32] * 4, padded=PaddedRow(30, 2))
    queue = queue_of(long_source, long_target)
    assert [tickets(step(queue, 10_000)) for _ in range(2)] == [[1], [2]], "together they cost 60 a row"


def test_generated_tokens_count_also_for_who_has_nothing_waiting() -> None:
    queue = queue_of(*(waiting(n, "a", job=f"j{n}") for n in range(100)))
    for _ in range(50):
        step(queue, 10)
    queue.charge("late", 50, now=0.0)
    for n in range(50):
        queue.add(waiting(100 + n, "late"), now=0.0)
    turns = ["late" if tickets(step(queue, 10))[0] >= 100 else "a" for _ in range(20)]
    assert turns[:4] == ["a"] * 4
    assert turns.count("a") in (12, 13)


def test_generated_tokens_are_of_the_tokens_per_minute_too() -> None:
    queue = queue_of(waiting(1, "a"), waiting(2, "a"), a=Share(tokens_per_minute=600))
    assert tickets(step(queue, 20)) == [1]
    assert step(queue, 20, now=0.5) == ()
    queue.charge("a", 10, now=0.5)
    assert step(queue, 20, now=1.0) == (), "another second to wait"
    assert tickets(step(queue, 20, now=2.0)) == [2]


def test_a_job_of_higher_priority_goes_strictly_before_its_tenants_others_only() -> None:
    queue = queue_of(
        waiting(1, "a", job="low", priority=Priority.LOW),
        waiting(2, "a", job="high", priority=Priority.HIGH),
        waiting(3, "a", job="high", priority=Priority.HIGH),
        waiting(4, "b", job="b1"),
        waiting(5, "b", job="b2"),
    )
    turns = [tickets(step(queue, 10))[0] for _ in range(5)]
    assert [turn for turn in turns if turn < 4] == [2, 3, 1]
    assert sorted(turns[:2]) == [2, 4], "b has its turns all the same"


def test_tokens_per_minute_keep_a_tenant_back_until_they_are_earned() -> None:
    queue = queue_of(*(waiting(n, "a", job=f"j{n}") for n in range(100)), a=Share(tokens_per_minute=600))
    served = 0
    for tenth in range(600):
        served += sum(entry.tokens for entry in step(queue, 20, now=tenth / 10))
    assert 600 <= served <= 600 + 20
    assert queue.next_ready() is not None
    assert queue.standing(99).ready_at is not None


def test_a_base_step_has_one_gang_or_none_and_the_fairest_ones_decides() -> None:
    entries = [waiting(n, f"t{n}", gang=GANGS[n % 3]) for n in range(9)]
    queue = queue_of(*entries)
    assert [tickets(step(queue, 1000)) for _ in range(3)] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    same_name = [waiting(1, "a", gang=GANGS[1]), waiting(2, "b", gang=Gang(name="group/one", combine="sum"))]
    assert len(step(queue_of(*same_name), 1000)) == 1


def test_a_lone_member_is_served_as_often_as_each_of_a_large_gang() -> None:
    queue, turns = FairQueue(), Counter[str]()
    for n in range(900):
        queue.add(waiting(n, f"t{n % 9}", gang=GANGS[1 if n % 9 < 8 else 2]), now=0.0)
    for _ in range(60):
        turns.update(entry.tenant_id for entry in step(queue, 80))
    assert turns["t8"] == turns["t0"]


def test_the_standing_says_who_is_before() -> None:
    queue = queue_of(
        waiting(1, "a", job="j1"), waiting(2, "a", job="j2"), waiting(3, "a", job="j2"), waiting(4, "b")
    )
    standing = queue.standing(3)
    assert (standing.tenants_ahead, standing.jobs_ahead, standing.earlier_microbatches) == (0, 1, 1)
    assert queue.standing(4).tenants_ahead == 1
    assert math.isinf(-queue._tenants["a"].ready_at)


def test_jobs_whose_deadlines_are_in_danger_go_first_the_earliest_deadline_first() -> None:
    queue = queue_of(
        waiting(1, "a", job="high", priority=Priority.HIGH),
        waiting(2, "a", job="later", due=Due(deadline=90.0, latest_start=10.0)),
        waiting(3, "a", job="calm", due=Due(deadline=50.0, latest_start=40.0)),
        waiting(4, "a", job="sooner", priority=Priority.LOW, due=Due(deadline=60.0, latest_start=20.0)),
    )
    turns = [tickets(step(queue, 10, now=30.0)) for _ in range(4)]
    assert turns == [[4], [2], [1], [3]]


def test_a_deadline_comes_into_danger_while_its_job_waits() -> None:
    queue = queue_of(
        waiting(1, "a", job="one"),
        waiting(2, "a", job="two"),
        waiting(3, "a", job="due", due=Due(deadline=9.0, latest_start=5.0)),
    )
    assert tickets(step(queue, 10, now=4.9)) == [1]
    assert tickets(step(queue, 10, now=5.0)) == [3]


def test_a_deadline_in_danger_takes_nothing_from_other_tenants() -> None:
    danger = Due(deadline=1.0, latest_start=0.0)
    queue = queue_of(*(waiting(n, "a", job=f"a{n}", due=danger) for n in range(50)))
    for n in range(50, 100):
        queue.add(waiting(n, "b", job=f"b{n}"), now=0.0)
    turns = ["a" if tickets(step(queue, 10))[0] < 50 else "b" for _ in range(60)]
    assert turns.count("a") == turns.count("b") == 30


def test_what_a_job_got_for_its_deadline_its_tenants_other_jobs_get_back() -> None:
    danger = Due(deadline=1.0, latest_start=0.0)
    queue = queue_of(*(waiting(n, "a", job="due", due=danger) for n in range(10)))
    for n in range(10, 30):
        queue.add(waiting(n, "a", job="other"), now=0.0)
    for n in range(30, 50):
        queue.add(waiting(n, "a", job="due"), now=0.0)
    turns = ["due" if not 10 <= tickets(step(queue, 10))[0] < 30 else "other" for _ in range(40)]
    assert turns[:10] == ["due"] * 10
    assert turns[10:19] == ["other"] * 9
    assert turns[20:].count("due") == turns[20:].count("other")
