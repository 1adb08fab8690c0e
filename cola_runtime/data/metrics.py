"""What a held-out set says of an adapter: the usual measures of each task, in plain numpy.

Shapes: N rows. Classes are whole numbers from 0. A measure that is undefined (no spread, no class) is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cola_runtime.data.rouge import rouge_l
from cola_runtime.job_choices import Metric
from cola_runtime.task_spec import (
    AnyTask,
    CausalLmTask,
    ClassificationTask,
    ImageClassificationTask,
    RegressionTask,
    SequenceToSequenceTask,
)

Floats = NDArray[np.float64]

_TOKENS = frozenset({Metric.LOSS, Metric.PERPLEXITY, Metric.ROUGE_L})
_CLASSES = frozenset({Metric.LOSS, Metric.ACCURACY, Metric.F1_MACRO, Metric.MATTHEWS})
_VALUES = frozenset({Metric.LOSS, Metric.PEARSON, Metric.SPEARMAN})

_MOST_NATS = 700.0  # exp of more is no float64


def evaluate(
    task: AnyTask,
    *,
    mean_loss: float,
    labels: Sequence[float] = (),
    predictions: Sequence[float] = (),
    answers: Sequence[tuple[str, str]] = (),
) -> dict[str, float]:
    """Name -> value; always `loss`, and where tokens are predicted `perplexity`.

    With `answers`, each a reference and what was generated instead, also `rouge_l`, the mean over them.

    For classes `accuracy`, `f1_macro` over the classes that occur as label or prediction, `matthews`, and of
    two classes also `f1`, that of class 1. For values, whose loss is the mean squared error, `pearson` and
    `spearman`.
    """
    measures = {"loss": mean_loss}
    if isinstance(task, CausalLmTask | SequenceToSequenceTask):
        measures["perplexity"] = math.exp(min(mean_loss, _MOST_NATS))
        if answers:
            measures["rouge_l"] = float(np.mean([rouge_l(*answer) for answer in answers]))
        return measures
    labels_N, predictions_N = np.asarray(labels, np.float64), np.asarray(predictions, np.float64)
    if isinstance(task, RegressionTask):
        measures["pearson"] = pearson(labels_N, predictions_N)
        measures["spearman"] = spearman(labels_N, predictions_N)
        return measures
    measures["accuracy"] = float(np.mean(labels_N == predictions_N))
    measures["f1_macro"] = f1_macro(labels_N, predictions_N)
    measures["matthews"] = matthews(labels_N, predictions_N)
    if task.head.labels == 2:
        measures["f1"] = f1(labels_N, predictions_N, of_class=1)
    return measures


def metrics_of(task: AnyTask) -> frozenset[Metric]:
    """The names that `evaluate` can give."""
    if isinstance(task, ClassificationTask | ImageClassificationTask):
        return _CLASSES | {Metric.F1} if task.head.labels == 2 else _CLASSES
    return _VALUES if isinstance(task, RegressionTask) else _TOKENS


def f1(labels_N: Floats, predictions_N: Floats, *, of_class: float) -> float:
    """2 TP / (2 TP + FP + FN)."""
    actual_N, predicted_N = labels_N == of_class, predictions_N == of_class
    found = int(np.sum(actual_N & predicted_N))
    return _ratio(2.0 * found, float(actual_N.sum() + predicted_N.sum()))


def f1_macro(labels_N: Floats, predictions_N: Floats) -> float:
    classes = np.union1d(labels_N, predictions_N)
    return float(np.mean([f1(labels_N, predictions_N, of_class=float(each)) for each in classes]))


def matthews(labels_N: Floats, predictions_N: Floats) -> float:
    """Correlation of two partitions, for any number of classes (Gorodkin 2004)."""
    classes_K = np.union1d(labels_N, predictions_N)
    actual_NK, predicted_NK = labels_N[:, None] == classes_K, predictions_N[:, None] == classes_K
    return _correlation(actual_NK.astype(np.float64), predicted_NK.astype(np.float64))


def pearson(labels_N: Floats, predictions_N: Floats) -> float:
    return _correlation(labels_N[:, None], predictions_N[:, None])


def spearman(labels_N: Floats, predictions_N: Floats) -> float:
    """Pearson's correlation of the ranks, ties sharing their mean rank."""
    return pearson(_ranks(labels_N), _ranks(predictions_N))


def _ranks(values_N: Floats) -> Floats:
    _, places_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = ((2 * last - counts + 1) / 2)[places_N]
    return ranks


def _correlation(left_NK: Floats, right_NK: Floats) -> float:
    """Sum of the columns' covariances over the root of both sums of variances."""
    left_NK, right_NK = (each - each.mean(axis=0) for each in (left_NK, right_NK))
    spread = math.sqrt(float((left_NK**2).sum()) * float((right_NK**2).sum()))
    return _ratio(float((left_NK * right_NK).sum()), spread)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
