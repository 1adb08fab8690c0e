"""`config schema` describes the job files that `run` accepts."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from cola_runtime.cli.config import job_file_schema
from cola_runtime.cli.job_file import read_job_file
from cola_runtime.errors import InvalidInput


def test_the_schema_accepts_a_good_job_file_and_refuses_a_bad_one(job_file: Path) -> None:
    fields = yaml.safe_load(job_file.read_text())
    jsonschema.validate(fields, job_file_schema())
    for wrong in ({"rank": 3}, {"adapter": {"rank": 0}}, {"training": 3}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**fields, **wrong}, job_file_schema())


def test_paths_are_relative_to_the_job_file(job_file: Path) -> None:
    job_file.write_text(job_file.read_text() + "evaluation: ../held.jsonl\n")
    job = read_job_file(job_file)
    assert job.training == job_file.parent / "train.jsonl"
    assert job.evaluation == job_file.parent / "../held.jsonl"


def test_held_out_rows_and_their_settings_stand_under_one_name(job_file: Path) -> None:
    job_file.write_text(job_file.read_text() + "evaluation:\n  data: held.jsonl\n  every: 5\n  patience: 2\n")
    jsonschema.validate(yaml.safe_load(job_file.read_text()), job_file_schema())
    job = read_job_file(job_file)
    assert job.evaluation == job_file.parent / "held.jsonl"
    assert (job.spec.evaluation.every, job.spec.evaluation.patience) == (5, 2)


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ("{data: 3}", "`evaluation.data` must be a path, got 3"),
        ("[a]", "`evaluation.data` must be a path"),
        ("{evry: 3}", "did you mean 'every'"),
        ("{every: 0}", "greater than or equal to 1"),
        ("{metric: bleu}", "'loss', 'perplexity', 'accuracy'"),
    ],
)
def test_wrong_evaluation_settings_are_named_with_their_line(
    job_file: Path, evaluation: str, message: str
) -> None:
    job_file.write_text(job_file.read_text() + f"evaluation: {evaluation}\n")
    with pytest.raises(InvalidInput) as caught:
        read_job_file(job_file)
    assert message in str(caught.value)
    assert f"{job_file}:5:" in str(caught.value)
