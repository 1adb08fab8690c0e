"""The fair queue and the packing, as pure functions."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cola_runtime.scheduler.packing import PaddedRow, first_prompts, padded_row, split_rows
from cola_runtime.scheduler.policy import Share, Waiting, admit, charge, choose
from cola_runtime.types import Gang, Row

GANGS = [None, Gang(name="group/one", combine="mean"), Gang(name="group/two", combine="mean")]


def waiting(
    ticket: int,
    tenant: str,
    *,
    rows: int = 1,
    longest: int = 10,
    job: str = "",
    train: bool = True,
    gang: Gang | None = None,
) -> Waiting:
    return Waiting(
        ticket=ticket,
        tenant_id=tenant,
        job_id=job or tenant,
        rows=rows,
        padded=PaddedRow(longest),
        train=train,
        gang=gang,
    )


def row(length: int) -> Row:
    return Row(tokens=np.zeros(length, np.int32), weights=np.ones(length, np.float32))


def test_least_served_tenant_goes_first() -> None:
    shares = {"a": Share(served=100), "b": Share(served=50)}
    chosen = choose([waiting(1, "a"), waiting(2, "b")], shares=shares, token_budget=10)
    assert [entry.tenant_id for entry in chosen] == ["b"]


def test_many_tenants_share_a_base_step_up_to_the_padded_budget() -> None:
    entries = [waiting(1, "a", longest=10), waiting(2, "b", longest=12), waiting(3, "c", longest=30)]
    chosen = choose(entries, shares={}, token_budget=40)
    assert [entry.tenant_id for entry in chosen] == ["a", "b"], "c would pad three rows to 30"


def test_rows_of_very_different_lengths_do_not_pad_each_other() -> None:
    entries = [
        waiting(1, "a", rows=8, longest=20),
        waiting(2, "b", rows=2, longest=100),
        waiting(3, "c", longest=24),
    ]
    chosen = choose(entries, shares={}, token_budget=10_000)
    assert [entry.tenant_id for entry in chosen] == ["a"], (
        "b would pad a's rows, and 24 is a fifth more for nine rows"
    )
    chosen = choose([entries[0], waiting(4, "d", rows=8, longest=22)], shares={}, token_budget=10_000)
    assert [entry.tenant_id for entry in chosen] == ["a", "d"]


def test_an_entry_above_the_budget_still_goes_alone() -> None:
    chosen = choose([waiting(1, "a", longest=500), waiting(2, "b")], shares={}, token_budget=100)
    assert [entry.ticket for entry in chosen] == [1]


def test_later_microbatches_of_a_job_never_overtake_its_first() -> None:
    """The last microbatch makes the device step, so order within a job is part of exactness."""
    entries = [
        waiting(1, "b"),
        waiting(2, "a", job="j", longest=90),  # does not fit beside b
        waiting(3, "a", job="j", longest=10),  # would fit
    ]
    chosen = choose(entries, shares={"a": Share(served=1)}, token_budget=40)
    assert [entry.ticket for entry in chosen] == [1]


def test_forward_only_work_never_shares_a_step_with_training() -> None:
    entries = [waiting(1, "a", train=False), waiting(2, "b", train=True), waiting(3, "c", train=False)]
    assert [entry.ticket for entry in choose(entries, shares={}, token_budget=100)] == [1, 3]


def test_a_base_step_has_one_gang_or_none_and_the_fairest_ones_decides() -> None:
    entries = [waiting(n, f"t{n}", gang=GANGS[n % 3]) for n in range(9)]
    for least_served in range(9):
        shares = {f"t{n}": Share(served=float(n != least_served)) for n in range(9)}
        chosen = choose(entries, shares=shares, token_budget=1000)
        expected = sorted(n for n in range(9) if n % 3 == least_served % 3)
        assert sorted(entry.ticket for entry in chosen) == expected
    same_name = [waiting(1, "a", gang=GANGS[1]), waiting(2, "b", gang=Gang(name="group/one", combine="sum"))]
    assert len(choose(same_name, shares={}, token_budget=1000)) == 1


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=2, max_size=8))
def test_neither_a_gang_nor_the_unmerged_starve(tenants: list[tuple[int, int]]) -> None:
    """Everybody always waits: before a tenant's turn comes, each other one is first at most 4 times."""
    entries = [
        waiting(n, f"t{n}", rows=rows, longest=10, gang=GANGS[gang]) for n, (gang, rows) in enumerate(tenants)
    ]
    shares: dict[str, Share] = {}
    last_turn = {entry.tenant_id: 0 for entry in entries}
    for turn in range(1, 200):
        chosen = choose(entries, shares=shares, token_budget=60)
        shares = charge(shares, {entry.tenant_id: entry.tokens for entry in chosen})
        last_turn |= {entry.tenant_id: turn for entry in chosen}
        assert turn - min(last_turn.values()) <= 4 * len(entries)


def test_a_lone_member_is_served_as_often_as_each_of_a_large_gang() -> None:
    entries = [waiting(n, f"t{n}", gang=GANGS[1]) for n in range(8)] + [waiting(8, "lone", gang=GANGS[2])]
    shares = {entry.tenant_id: Share() for entry in entries}
    turns = {"lone": 0, "t0": 0}
    for _ in range(100):
        chosen = choose(entries, shares=shares, token_budget=1000)
        shares = charge(shares, {entry.tenant_id: entry.tokens for entry in chosen})
        for tenant in turns:
            turns[tenant] += tenant in {entry.tenant_id for entry in chosen}
    assert turns == {"lone": 50, "t0": 50}


def test_weight_two_is_served_twice_the_tokens() -> None:
    shares = {"a": Share(weight=1.0), "b": Share(weight=2.0)}
    served = {"a": 0, "b": 0}
    for _ in range(300):
        chosen = choose([waiting(1, "a"), waiting(2, "b")], shares=shares, token_budget=10)
        tokens = {entry.tenant_id: entry.tokens for entry in chosen}
        shares = charge(shares, tokens)
        for tenant, count in tokens.items():
            served[tenant] += count
    assert served["b"] == 2 * served["a"]


def test_idleness_cannot_be_saved_up() -> None:
    shares = {"a": Share(served=1000.0), "b": Share(served=10.0)}
    assert admit(shares, "b", active=["a"])["b"].served == 1000.0
    assert admit(shares, "new", active=["a"])["new"].served == 1000.0
    assert admit(shares, "b", active=[])["b"].served == 10.0


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_split_rows_keeps_every_row_once_in_order_and_under_the_budget(
    lengths: list[int], budget: int
) -> None:
    rows = [row(length) for length in lengths]
    parts = split_rows(rows, token_budget=budget)
    assert [r for part in parts for r in part] == rows
    for part in parts:
        padded = len(part) * max(len(r.tokens) for r in part)
        assert padded <= budget or len(part) == 1


def pair(source: int, target: int) -> Row:
    tokens = np.zeros(target, np.int32)
    return Row(tokens=tokens, weights=np.ones(target, np.float32), source=np.zeros(source, np.int32))


def test_sources_and_targets_are_padded_each_to_their_longest() -> None:
    rows = [pair(30, 2), pair(4, 10), pair(30, 10)]
    assert padded_row(rows[:2]) == PaddedRow(10, 30)
    assert split_rows(rows, token_budget=79) == [(rows[0],), (rows[1],), (rows[2],)]
    assert split_rows(rows, token_budget=80) == [(rows[0], rows[1]), (rows[2],)]
    long_source, long_target = (
        Waiting(ticket=n, tenant_id=f"t{n}", job_id=f"j{n}", rows=1, padded=padded_row([r]), train=True)
        for n, r in enumerate([pair(30, 2), pair(2, 30)])
    )
    assert (long_source.tokens, long_target.tokens) == (32, 32)
    alone = choose([long_source, long_target], shares={}, token_budget=119)
    assert alone == (long_source,), "beside each other they cost two rows of 60"


def test_prompts_are_answered_in_parts_of_the_budget() -> None:
    prompts = [[0] * length for length in (4, 6, 6, 50)]
    assert list(first_prompts(prompts, new_tokens=4, token_budget=20)) == prompts[:2]
    assert list(first_prompts(prompts, new_tokens=4, token_budget=3)) == prompts[:1]
    assert list(first_prompts(prompts[3:], new_tokens=4, token_budget=20)) == prompts[3:]
