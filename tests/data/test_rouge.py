"""ROUGE-L against values worked out by hand from its definition, and the usual table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_runtime.data.metrics import evaluate
from cola_runtime.data.rouge import longest_common_subsequence, rouge_l
from cola_runtime.job_choices import Metric
from cola_runtime.task_spec import CausalLmTask, SequenceToSequenceTask

WORDS = st.lists(st.sampled_from("abcd"), max_size=90)


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("police killed the gunman", "police kill the gunman", 3 / 4),
        ("police killed the gunman", "the gunman kill police", 2 / 4),
        ("the cat sat on the mat", "the cat on the mat", 10 / 11),
        ("the cat sat", "the the the the", 2 / 7),
        ("The quick, brown FOX!", "the quick brown fox", 1.0),
        ("A-b_c", "a b c", 1.0),  # an underscore is no letter
        ("it's 3.5", "it s 3 5", 1.0),
        ("café", "caf", 1.0),  # letters beyond ASCII part tokens
        ("running", "run", 0.0),  # no stemming
        ("one two", "", 0.0),
        ("", "one two", 0.0),
        ("…", "—", 0.0),
    ],
)
def test_hand_worked_values(reference: str, answer: str, expected: float) -> None:
    assert rouge_l(reference, answer) == pytest.approx(expected, abs=1e-15)


@given(left=WORDS, right=WORDS)
def test_the_longest_common_subsequence_is_the_tables(left: list[str], right: list[str]) -> None:
    row = [0] * (len(right) + 1)
    for one in left:
        before = row
        row = [0]
        for place, other in enumerate(right):
            row.append(before[place] + 1 if one == other else max(row[-1], before[place + 1]))
    assert longest_common_subsequence(left, right) == row[-1]


@pytest.mark.parametrize("task", [CausalLmTask(), SequenceToSequenceTask()], ids=str)
def test_it_is_the_mean_over_the_answers_and_there_only_with_them(task: CausalLmTask) -> None:
    answers = [("a b", "a b"), ("a b", "c"), ("a b c", "a c")]
    assert evaluate(task, mean_loss=1.0, answers=answers)["rouge_l"] == pytest.approx((1 + 0 + 4 / 5) / 3)
    assert evaluate(task, mean_loss=1.0).keys() == {"loss", "perplexity"}
    assert Metric.ROUGE_L.greater_is_better and Metric.ROUGE_L.generates
