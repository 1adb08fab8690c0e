"""Outside input to a `JobSpec`, or one violation per wrong field: where, what was given, what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any, get_args

from pydantic import ValidationError

from cola_runtime.errors import InvalidInput, Violation
from cola_runtime.spec import PART_MODELS, PARTS_TAG, JobSpec
from cola_runtime.task_spec import TASK_MODELS


def parse_job_spec(fields: dict[str, Any], *, source: str = "job") -> JobSpec:
    """Check outside input. Raises InvalidInput with one violation per wrong field, at `source.field`."""
    try:
        return JobSpec.model_validate(fields)
    except ValidationError as error:
        violations = tuple(_violations(error, source))
        reason = "UNKNOWN_FIELD" if any("unknown field" in v.message for v in violations) else "SPEC_INVALID"
        text = "; ".join(f"{v.where}: {v.message}" for v in violations)
        raise InvalidInput(
            reason,
            text,
            remedy="Correct the field and submit again; nothing was created.",
            violations=violations,
        ) from error


def _violations(error: ValidationError, source: str) -> Iterator[Violation]:
    for item in error.errors(include_url=False):
        path = [str(part) for part in item["loc"] if "[" not in str(part)]
        where = ".".join(
            [source, *(part for part in path if part not in (*PART_MODELS, *TASK_MODELS, PARTS_TAG))]
        )
        if item["type"] == "extra_forbidden":
            yield Violation(where=where, message=_unknown_field(path))
        elif item["type"] == "union_tag_invalid":
            known = TASK_MODELS if path[:1] == ["task"] else PART_MODELS
            yield Violation(where=f"{where}.kind", message=_unknown_kind(item["ctx"]["tag"], known))
        else:
            got = f"{item['msg']}, got {item['input']!r}"[:250]
            yield Violation(where=where, message=f"{got}{_allowed(path)}")


_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _allowed(path: list[str]) -> str:
    """The range of the number at `path`; "" of what has none."""
    fields = _model_at(path).model_fields
    named = [fields[part] for part in path if part in fields]
    if not named:
        return ""
    field = named[-1]
    parts = [part for each in get_args(field.annotation) for part in getattr(each, "__metadata__", ())]
    limits = [*field.metadata, *(limit for part in parts for limit in getattr(part, "metadata", ()))]
    texts = dict.fromkeys(
        f"{sign} {getattr(limit, name):,}"
        for limit in limits
        for name, sign in _SIGNS.items()
        if hasattr(limit, name)
    )
    return f"; allowed: {' and '.join(texts)}" if texts else ""


def _model_at(path: list[str]) -> Any:
    """The model that the last part of `path` belongs to."""
    model: Any = JobSpec
    for part in path[:-1]:
        if part in PART_MODELS or part in TASK_MODELS:
            model = (PART_MODELS | TASK_MODELS)[part]
        elif part in model.model_fields and part not in ("adapter", "task"):
            annotation = model.model_fields[part].annotation
            inner = next((each for each in get_args(annotation) if each is not NoneType), annotation)
            model = inner if hasattr(inner, "model_fields") else model
    return model


def _unknown_field(path: list[str]) -> str:
    model = _model_at(path)
    near = difflib.get_close_matches(path[-1], model.model_fields, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(model.model_fields)}"
    return f"unknown field {path[-1]!r}; {hint}"


def _unknown_kind(kind: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(kind, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known kinds: {', '.join(known)}"
    noun = "task" if known is TASK_MODELS else "adapter"
    return f"unknown {noun} kind {kind[:60]!r}; {hint}"
