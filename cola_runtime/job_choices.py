"""What a job chooses from by name: what it trains for, by what it is judged, its priority, whose devices."""

from __future__ import annotations

import enum


class Task(enum.StrEnum):
    """What a job trains for; the value is `task.kind` in its spec."""

    CAUSAL_LM = "causal_lm"
    SEQUENCE_TO_SEQUENCE = "sequence_to_sequence"
    SEQUENCE_CLASSIFICATION = "sequence_classification"
    REGRESSION = "regression"
    IMAGE_CLASSIFICATION = "image_classification"


class Metric(enum.StrEnum):
    """What an evaluation on held-out rows may be judged by."""

    LOSS = "loss"  # mean over the label tokens, nats
    PERPLEXITY = "perplexity"  # e to the loss
    ACCURACY = "accuracy"
    F1 = "f1"  # of class 1 of two
    F1_MACRO = "f1_macro"
    MATTHEWS = "matthews"
    PEARSON = "pearson"
    SPEARMAN = "spearman"
    ROUGE_L = "rouge_l"  # mean F-measure of generated answers against the completions

    @property
    def greater_is_better(self) -> bool:
        return self not in (Metric.LOSS, Metric.PERPLEXITY)

    @property
    def generates(self) -> bool:
        """It needs an answer to every held-out prompt, which costs a forward pass per token."""
        return self is Metric.ROUGE_L


class Priority(enum.IntEnum):
    """Order among the jobs of one tenant; it says nothing about other tenants' jobs."""

    LOW = -1
    NORMAL = 0
    HIGH = 1


class TrustClass(enum.StrEnum):
    """Whose a device is; a job names the classes that may see what its gradients reveal of its data."""

    TRUSTED = "trusted"  # the operator's own
    COMMUNITY = "community"  # anyone's whom the operator gave a join token
