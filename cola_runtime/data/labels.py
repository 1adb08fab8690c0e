"""A record's label in the words of the job's task: a class from 0, or a number."""

from __future__ import annotations

import difflib

from cola_runtime.data.records import ImageRecord, LabelledRecord
from cola_runtime.data.violations import Problem
from cola_runtime.task_spec import LabelledTask, RegressionTask

MAX_VALUE = 3.0e38  # beyond, float32 has no number
_LISTED_NAMES = 12


def label_value(record: LabelledRecord | ImageRecord, task: LabelledTask) -> int | float:
    """The class's number, or the value to learn. A class may be given by name or by number.

    Raises Problem `LABEL_INVALID` for the wrong type, `LABEL_UNKNOWN` for a name that the job does not list,
    with the nearest one, `LABEL_OUT_OF_RANGE`.
    """
    label = record.label
    if isinstance(task, RegressionTask):
        return _value(label)
    if isinstance(label, str) and task.label_names:
        return _class_named(label, task.label_names)
    if not isinstance(label, int):
        expected = "a name or a whole number" if task.label_names else "a whole number"
        raise Problem("LABEL_INVALID", f"label: {_shown(label)} is not {expected}")
    highest = task.head.labels - 1
    if not 0 <= label <= highest:
        raise Problem(
            "LABEL_OUT_OF_RANGE",
            f"label: class {_shown(label)} is not from 0 to {highest}",
            limit=f"0 to {highest}",
            actual=_shown(label),
        )
    return label


def _value(label: str | int | float) -> float:
    if isinstance(label, str):
        raise Problem("LABEL_INVALID", f"label: {_shown(label)} is not a number")
    if not -MAX_VALUE <= label <= MAX_VALUE:
        message = f"label: {_shown(label)} is too large"
        raise Problem("LABEL_OUT_OF_RANGE", message, limit=f"{MAX_VALUE:g}", actual=_shown(label))
    return float(label)


def _class_named(name: str, names: tuple[str, ...]) -> int:
    if name in names:
        return names.index(name)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names[:_LISTED_NAMES])}"
    raise Problem("LABEL_UNKNOWN", f"label: {_shown(name)} is none of the job's labels; {hint}")


def _shown(label: str | int | float) -> str:
    return repr(label)[:80]
