"""Kinds x modes x encodings x architectures x tasks, against ordinary modules and autograd.

`make matrix` runs all of it and prints the table; a plain run takes `QUICK`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cola_runtime.encodings import Encoding
from cola_runtime.job_choices import Task
from tests.matrix.cells import MODES, SETTINGS, cells
from tests.matrix.conftest import Results
from tests.matrix.engine import Setting, gradient_errors, trajectory_errors

BOUNDS = {"float64": 1e-10, "float32": 1e-5}
TRAJECTORY_STEPS = 50
TRAJECTORIES = (("gpt2", Task.CAUSAL_LM), ("llama", Task.CAUSAL_LM), ("bert", Task.SEQUENCE_CLASSIFICATION))
TRAJECTORY_BOUND = 1e-8


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize(("architecture", "task"), SETTINGS)
def test_gradients_are_autograds(
    architecture: str,
    task: Task,
    dtype: str,
    mode: str,
    encoding: Encoding,
    model_folder: Path,
    results: Results,
) -> None:
    setting = Setting(architecture, task, dtype, model_folder)
    found = gradient_errors(setting, mode, encoding)
    empty = {cell: why for cell, why in cells(architecture, task, mode, encoding).items() if why is not None}
    results.setdefault(f"gradients, {dtype}", {}).update({**found, **empty})
    worst = max(found, key=lambda cell: found[cell])
    assert found[worst] < BOUNDS[dtype], (worst, found[worst])


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("architecture", "task"), TRAJECTORIES)
def test_fifty_steps_of_adamw_end_where_ordinary_modules_do(
    architecture: str,
    task: Task,
    mode: str,
    encoding: Encoding,
    model_folder: Path,
    results: Results,
) -> None:
    setting = Setting(architecture, task, "float64", model_folder)
    found = trajectory_errors(setting, mode, encoding, steps=TRAJECTORY_STEPS)
    empty = {cell: why for cell, why in cells(architecture, task, mode, encoding).items() if why is not None}
    results.setdefault(f"weights after {TRAJECTORY_STEPS} steps, float64", {}).update({**found, **empty})
    worst = max(found, key=lambda cell: found[cell])
    assert found[worst] < TRAJECTORY_BOUND, (worst, found[worst])
