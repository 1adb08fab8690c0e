"""job.yaml: the fields of a JobSpec, and where its data are: `training` and `evaluation.data`, paths relative
to the file. `evaluation: held_out.jsonl` is short for `evaluation: {data: held_out.jsonl}`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cola_runtime.errors import InvalidInput, Violation
from cola_runtime.spec import JobSpec
from cola_runtime.spec_parsing import parse_job_spec

DATA_FIELDS = ("training", "evaluation")
TRAINING, HELD_OUT = ("training",), ("evaluation", "data")
MAX_FILE_BYTES = 1 << 20
_REMEDY = "Correct the file and try again; nothing was created."

FieldPath = tuple[str, ...]
Places = dict[FieldPath, str]
"""Path of a field -> `file:line:column` of its key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFile:
    spec: JobSpec
    training: Path
    evaluation: Path | None


def read_job_file(file: Path) -> JobFile:
    """Raises InvalidInput; each violation names `file:line:column` and the field."""
    fields, places = _read(file)
    data = _take_data(fields)
    problems = [*_near_data_fields(fields, places), *_wrong_paths(data, places, str(file))]
    if problems:
        text = "; ".join(f"{each.where}: {each.message}" for each in problems)
        raise InvalidInput("JOB_FILE_INVALID", text, remedy=_REMEDY, violations=tuple(problems))
    try:
        spec = parse_job_spec(fields, source="job")
    except InvalidInput as error:
        raise _placed(error, places, str(file)) from error
    paths = {name: file.parent / value for name, value in data.items() if value is not None}
    return JobFile(spec=spec, training=paths[TRAINING], evaluation=paths.get(HELD_OUT))


def _take_data(fields: dict[str, Any]) -> dict[FieldPath, Any]:
    """The paths, out of the fields; what is left is a JobSpec's."""
    evaluation = fields.pop("evaluation", None)
    if isinstance(evaluation, dict):
        settings = {str(name): value for name, value in evaluation.items()}
        evaluation = settings.pop("data", None)
        fields["evaluation"] = settings
    return {TRAINING: fields.pop("training", None), HELD_OUT: evaluation}


def _read(file: Path) -> tuple[dict[str, Any], Places]:
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise _unreadable(file, "it is too large for a job file")
        text = file.read_text(encoding="utf-8")
        fields, tree = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise _unreadable(file, error.strerror or "it cannot be read") from error
    except UnicodeDecodeError as error:
        raise _unreadable(file, f"it is not UTF-8 at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise _not_yaml(file, error) from error
    if not isinstance(fields, dict):
        raise _unreadable(file, "it must be a mapping of field names to values")
    return {str(name): value for name, value in fields.items()}, dict(_places(tree, str(file), ()))


def _places(node: Any, file: str, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = (*path, str(key.value))
            yield name, f"{file}:{key.start_mark.line + 1}:{key.start_mark.column + 1}"
            yield from _places(value, file, name)


def _near_data_fields(fields: dict[str, Any], places: Places) -> Iterator[Violation]:
    """A misspelt `training` is not a JobSpec field, so it is looked for here."""
    for name in fields:
        near = difflib.get_close_matches(name, [*JobSpec.model_fields, *DATA_FIELDS], n=1)
        if name not in JobSpec.model_fields and near and near[0] in DATA_FIELDS:
            yield Violation(where=places[name,], message=f"unknown field {name!r}; did you mean {near[0]!r}?")


def _wrong_paths(data: dict[FieldPath, Any], places: Places, file: str) -> Iterator[Violation]:
    if data[TRAINING] is None:
        yield Violation(where=places.get(TRAINING, file), message="`training` must name a JSONL file")
    for path, value in data.items():
        if value is not None and not isinstance(value, str):
            where = places.get(path) or places[path[:1]]
            yield Violation(where=where, message=f"`{'.'.join(path)}` must be a path, got {value!r}")


def _placed(error: InvalidInput, places: Places, file: str) -> InvalidInput:
    """The same error, each violation at its line of the file."""
    violations = tuple(_at_line(violation, places, file) for violation in error.violations)
    text = "; ".join(f"{each.where}: {each.message}" for each in violations)
    return InvalidInput(error.reason, text, remedy=_REMEDY, violations=violations)


def _at_line(violation: Violation, places: Places, file: str) -> Violation:
    path = tuple(violation.where.split(".")[1:])
    known = next((path[:n] for n in range(len(path), 0, -1) if path[:n] in places), None)
    where = places[known] if known else file
    return Violation(
        where=where, message=f"{'.'.join(path)}: {violation.message}" if path else violation.message
    )


def _not_yaml(file: Path, error: yaml.YAMLError) -> InvalidInput:
    mark = getattr(error, "problem_mark", None)
    where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else str(file)
    problem = getattr(error, "problem", None) or "it cannot be parsed"
    return InvalidInput("JOB_FILE_YAML", f"not valid YAML: {problem}", where=where, remedy=_REMEDY)


def _unreadable(file: Path, problem: str) -> InvalidInput:
    return InvalidInput(
        "JOB_FILE_UNREADABLE", f"cannot use the job file: {problem}", where=str(file), remedy=_REMEDY
    )
