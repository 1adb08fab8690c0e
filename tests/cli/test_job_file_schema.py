"""`config schema` describes the job files that `run` accepts."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from cola_runtime.cli.config import job_file_schema
from cola_runtime.cli.job_file import read_job_file


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
