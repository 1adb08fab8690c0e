"""What a job trains for: the `task` of its spec. Imports pydantic only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints, model_validator

from cola_runtime.adapter_spec import MAX_LABELS, Frozen, HeadKind

LabelCount = Annotated[int, Field(ge=2, le=MAX_LABELS, strict=True)]
LabelNames = Annotated[
    tuple[Annotated[str, StringConstraints(min_length=1, max_length=200)], ...],
    Field(min_length=2, max_length=MAX_LABELS),
]


class CausalLmTask(Frozen):
    """Learn to continue a text."""

    kind: Literal["causal_lm"] = "causal_lm"

    @property
    def head(self) -> None:
        """The vocabulary is the base model's own."""


class SequenceToSequenceTask(Frozen):
    """Learn to write the completion of a prompt that an encoder reads."""

    kind: Literal["sequence_to_sequence"] = "sequence_to_sequence"

    @property
    def head(self) -> None:
        """The vocabulary is the base model's own."""


class _Labels(Frozen):
    """What the classification tasks have in common."""

    labels: LabelCount | LabelNames
    """How many, or their names in the order of the classes."""

    @model_validator(mode="after")
    def _names_differ(self) -> _Labels:
        if len(set(self.label_names)) < len(self.label_names):
            raise ValueError("two labels have the same name")
        return self

    @property
    def label_names(self) -> tuple[str, ...]:
        """Empty where the job only counts its labels."""
        return self.labels if isinstance(self.labels, tuple) else ()

    @property
    def head(self) -> HeadKind:
        count = len(self.labels) if isinstance(self.labels, tuple) else self.labels
        return HeadKind(labels=count, problem="classification")


class ClassificationTask(_Labels):
    """Learn which of a few labels a text, or a pair of texts, has."""

    kind: Literal["sequence_classification"] = "sequence_classification"


class ImageClassificationTask(_Labels):
    """Learn which of a few labels an image has."""

    kind: Literal["image_classification"] = "image_classification"


class RegressionTask(Frozen):
    """Learn a number for a text, or a pair of texts."""

    kind: Literal["regression"] = "regression"

    @property
    def head(self) -> HeadKind:
        return HeadKind(labels=1, problem="regression")


LabelledTask = ClassificationTask | RegressionTask | ImageClassificationTask
AnyTask = CausalLmTask | SequenceToSequenceTask | LabelledTask
TaskSpec = Annotated[AnyTask, Field(discriminator="kind")]
TASK_MODELS: dict[str, type[BaseModel]] = {
    "causal_lm": CausalLmTask,
    "sequence_to_sequence": SequenceToSequenceTask,
    "sequence_classification": ClassificationTask,
    "regression": RegressionTask,
    "image_classification": ImageClassificationTask,
}
