"""Measures against values computed by hand, and against values that scikit-learn and scipy gave."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cola_runtime.data.metrics import (
    evaluate,
    f1,
    f1_macro,
    matthews,
    metrics_of,
    pearson,
    spearman,
)
from cola_runtime.task_spec import (
    AnyTask,
    CausalLmTask,
    ClassificationTask,
    RegressionTask,
    SequenceToSequenceTask,
)

# Class 1: 3 found, 1 missed, 2 wrongly; class 0: 4 found.
LABELS = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], np.float64)
PREDICTIONS = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0], np.float64)


def test_two_classes_by_hand() -> None:
    found = evaluate(ClassificationTask(labels=2), mean_loss=0.5, labels=LABELS, predictions=PREDICTIONS)
    assert found == {
        "loss": 0.5,
        "accuracy": 0.7,
        "f1": pytest.approx(2 * 3 / (2 * 3 + 2 + 1)),
        "f1_macro": pytest.approx((6 / 9 + 8 / 11) / 2),
        "matthews": pytest.approx((3 * 4 - 2 * 1) / math.sqrt(5 * 4 * 6 * 5)),
    }


def test_three_classes_by_hand() -> None:
    labels, predictions = np.array([0.0, 1, 2, 2]), np.array([0.0, 2, 2, 2])
    assert f1_macro(labels, predictions) == pytest.approx((1 + 0 + 4 / 5) / 3)
    # Gorodkin: (c s - sum p t) / sqrt((s^2 - sum p^2)(s^2 - sum t^2)) with c = 3, s = 4
    assert matthews(labels, predictions) == pytest.approx((3 * 4 - 7) / math.sqrt((16 - 10) * (16 - 6)))
    assert "f1" not in evaluate(
        ClassificationTask(labels=3), mean_loss=0.0, labels=labels, predictions=labels
    )


def test_values_by_hand() -> None:
    labels, predictions = np.array([1.0, 2, 3, 4]), np.array([2.0, 1, 1, 10])
    found = evaluate(RegressionTask(), mean_loss=2.0, labels=labels, predictions=predictions)
    assert found["loss"] == 2.0
    assert found["pearson"] == pytest.approx(12 / math.sqrt(5 * 57))
    # ranks 3, 1.5, 1.5, 4 against 1, 2, 3, 4
    assert found["spearman"] == pytest.approx(1.5 / math.sqrt(5 * 4.5))


def test_perplexity_is_the_exponential_of_the_loss_and_stays_finite() -> None:
    assert evaluate(CausalLmTask(), mean_loss=2.0) == {"loss": 2.0, "perplexity": pytest.approx(math.exp(2))}
    assert math.isfinite(evaluate(CausalLmTask(), mean_loss=1e6)["perplexity"])


def test_what_is_undefined_is_zero() -> None:
    ones = np.ones(3)
    assert matthews(ones, np.array([1.0, 0, 1])) == 0.0
    assert pearson(ones, np.arange(3.0)) == 0.0
    assert spearman(np.arange(3.0), ones) == 0.0
    assert f1(np.zeros(3), np.zeros(3), of_class=1) == 0.0


@pytest.mark.parametrize(
    "task",
    [
        CausalLmTask(),
        SequenceToSequenceTask(),
        ClassificationTask(labels=2),
        ClassificationTask(labels=3),
        RegressionTask(),
    ],
    ids=str,
)
def test_a_task_gives_the_metrics_that_it_says(
    task: AnyTask,
) -> None:
    found = evaluate(task, mean_loss=1.0, labels=LABELS, predictions=PREDICTIONS, answers=[("a b", "b")])
    assert found.keys() == metrics_of(task)


def test_scikit_learn_and_scipy_agree() -> None:
    """Values of scikit-learn 1.9.1 and scipy 1.17.1 for the same draws."""
    random = np.random.default_rng(0)
    labels, predictions = (random.integers(0, 5, 200).astype(float) for _ in range(2))
    assert f1_macro(labels, predictions) == pytest.approx(0.18534618837091887, rel=1e-12)
    assert matthews(labels, predictions) == pytest.approx(-0.0153198973019696, rel=1e-12)
    assert spearman(labels, predictions) == pytest.approx(0.08897391021587718, rel=1e-12)
    assert pearson(labels, predictions) == pytest.approx(0.08222095546718475, rel=1e-12)
