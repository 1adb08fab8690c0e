"""Bad input gets an error that names place, limit and remedy, exit code 3, and nothing is created."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from serving import BASE_MODEL, Served

GOOD = b'{"prompt": "How? ", "completion": "So."}\n'
BROKEN_118 = GOOD * 117 + b'{"prompt": "How? ", "completion": }\n' + GOOD
TOO_LONG = GOOD * 3 + json.dumps({"prompt": "a" * 400, "completion": "b"}).encode() + b"\n"
JOB = f"name: greeter\nbase_model: {BASE_MODEL}\ntraining: train.jsonl\n"

CASES = {
    "empty file": (JOB, b"", ("train.jsonl", "no record", "Correct the file")),
    "broken JSON on line 118": (JOB, BROKEN_118, ("train.jsonl:118:35", "invalid JSON", "Correct the file")),
    "rank 0": (
        JOB + "adapter:\n  rank: 0\n",
        GOOD,
        ("job.yaml:5:3", "rank", "greater than or equal to 1", "got 0"),
    ),
    "unknown base model": (
        JOB.replace(BASE_MODEL, "gpt-9"),
        GOOD,
        ("job.base_model", "'gpt-9'", f"Served: {BASE_MODEL}"),
    ),
    "unknown field with a near name": (
        JOB + "optimizer:\n  learing_rate: 1.0\n",
        GOOD,
        ("job.yaml:5:3", "learing_rate", "did you mean 'learning_rate'"),
    ),
    "sequence longer than the context": (
        JOB,
        TOO_LONG,
        ("train.jsonl:4", "limit 256 tokens", "got 402 tokens", "max_length or truncate"),
    ),
    "unknown field at the top": (JOB + "stepz: 3\n", GOOD, ("job.yaml:4:1", "did you mean 'steps'")),
    "misspelt data field": (JOB + "evaluaton: x\n", GOOD, ("job.yaml:4:1", "did you mean 'evaluation'")),
    "no training": (JOB.replace("training: train.jsonl", ""), GOOD, ("job.yaml", "`training` must name")),
    "training is a number": (
        JOB.replace("train.jsonl", "3"),
        GOOD,
        ("job.yaml:3:1", "must be a path, got 3"),
    ),
    "missing data file": (
        JOB.replace("train.jsonl", "no.jsonl"),
        GOOD,
        ("no.jsonl", "cannot read", "JSONL file"),
    ),
    "YAML that is none": (JOB + "x: [1, 2\n", GOOD, ("job.yaml:5:1", "not valid YAML")),
    "YAML with an object of Python": (
        JOB + "x: !!python/name:os.system\n",
        GOOD,
        ("job.yaml:4", "not valid YAML"),
    ),
    "a list": ("- 1\n", GOOD, ("job.yaml", "must be a mapping")),
    "nothing": ("", GOOD, ("job.yaml", "must be a mapping")),
    "steps and passes": (JOB + "steps: 1\npasses: 1\n", GOOD, ("job.yaml", "steps or passes, not both")),
    "name with a path": (JOB.replace("greeter", "../x"), GOOD, ("job.yaml:1:1", "name")),
    "infinite learning rate": (
        JOB + "optimizer:\n  learning_rate: .inf\n",
        GOOD,
        ("job.yaml:5:3", "learning_rate", "finite"),
    ),
    "no such modules": (
        JOB + "adapter: {target_modules: [k_proj]}\n",
        GOOD,
        ("no module is named 'k_proj'", "q_proj", "all-linear"),
    ),
    "max_length above the context": (JOB + "max_length: 300\n", GOOD, ("max_length", "limit 256", "got 300")),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_explained_and_creates_nothing(
    cola: Callable[..., object], served: Served, tmp_path: Path, case: str
) -> None:
    job, rows, parts = CASES[case]
    (tmp_path / "job.yaml").write_text(job)
    (tmp_path / "train.jsonl").write_bytes(rows)
    for command in (("run",), ("jobs", "submit"), ("dataset", "check")):
        ran = cola(*command, "-f", tmp_path / "job.yaml")
        assert (ran.code, ran.out) == (3, "")
        assert all(part in ran.err for part in parts), ran.err
        assert "Traceback" not in ran.err
        as_json = cola(*command, "-f", tmp_path / "job.yaml", "--json")
        error = as_json.json["error"]
        assert (as_json.code, as_json.err, error["exit_code"]) == (3, "", 3)
        assert error["reason"] in ran.err
        assert error["remedy"]
    assert served.nothing_exists()


def test_the_whole_of_it_in_a_process_of_its_own(served: Served, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "train.jsonl").write_bytes(BROKEN_118)
    environment = {**os.environ, "COLA_BASE_URL": served.url, "COLA_API_KEY": served.keys["alice"]}
    command = [sys.executable, "-m", "cola_runtime.cli.main", "run", "-f", "job.yaml"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.splitlines()[1].startswith("  train.jsonl:118:35: invalid JSON")
    assert served.nothing_exists()


def test_every_wrong_line_is_listed(cola: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "train.jsonl").write_bytes(GOOD + b"{\n" + GOOD + b"[]\n" + b'{"prompt": ""}\n')
    ran = cola("run", "-f", tmp_path / "job.yaml")
    assert [line for line in (2, 4, 5) if f"train.jsonl:{line}:" in ran.err] == [2, 4, 5]
    assert "2 more lines have errors" in ran.err
    assert ran.err.count("train.jsonl:2:") == 1
