from __future__ import annotations

import itertools

import pytest

from cola_runtime.errors import Conflict
from cola_runtime.jobs.state import TERMINAL_STATES, TRANSITIONS, JobState, check_transition


def test_every_state_has_a_row_in_the_table() -> None:
    assert set(TRANSITIONS) == set(JobState)


@pytest.mark.parametrize("state", sorted(TERMINAL_STATES))
def test_a_terminal_state_never_changes(state: JobState) -> None:
    for after in JobState:
        with pytest.raises(Conflict, match="none: it has ended") as caught:
            check_transition(state, after)
        assert caught.value.reason == "TRANSITION_ILLEGAL"
        assert caught.value.actual == state


def test_every_state_is_reachable_from_queued() -> None:
    reached = {JobState.QUEUED}
    for _ in JobState:
        reached |= set(itertools.chain.from_iterable(TRANSITIONS[state] for state in reached))
    assert reached == set(JobState)


@pytest.mark.parametrize("state", list(JobState))
def test_no_state_follows_itself(state: JobState) -> None:
    with pytest.raises(Conflict):
        check_transition(state, state)
