"""What quality.py's figures rest on: no input in two parts, fair shares, results kept and taken up again."""

import hashlib
import io
import json
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cola_runtime.testing import quality_data
from cola_runtime.testing.cells import Cell, Cells
from cola_runtime.testing.quality_data import Example, bigbench_examples, shards, split_by_input
from cola_runtime.types import TensorKey, TensorKind

CHOSEN = {"lora": 1e-3, "linear": 1e-4, "mlp": 1e-3, "full": 1e-5, "alone": 3e-4, "collaboration": 3e-4}
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EXAMPLES = [
    Example(f"input {number % 50}", f"target {number}") for number in range(200)
]  # four of each input


def inputs(part: list[Example]) -> set[str]:
    return {example.input for example in part}


def test_no_input_is_in_two_parts_and_the_parts_have_the_sizes_asked_for():
    held_out, validation, training = split_by_input(EXAMPLES, (10, 7), seed=0)
    assert (len(held_out), len(validation)) == (10, 7)
    assert not inputs(held_out) & inputs(validation)
    assert not inputs(training) & (inputs(held_out) | inputs(validation))
    assert len(training) == 200 - 12 - 8, "of a group that is cut, nothing goes to another part"
    assert split_by_input(EXAMPLES, (10, 7), seed=0)[2] == training
    assert split_by_input(EXAMPLES, (10, 7), seed=1)[0] != held_out


def test_shards_hold_every_example_once_and_no_input_twice():
    parts = shards(EXAMPLES, 8, seed=0)
    assert Counter(map(repr, EXAMPLES)) == Counter(repr(each) for part in parts for each in part)
    assert sum(len(inputs(part)) for part in parts) == 50
    assert max(map(len, parts)) - min(map(len, parts)) <= 4, "they differ by a group at most"


def archive(folder: Path, examples: list[dict[str, object]]) -> str:
    """A small archive in the place of the real one; its checksum."""
    content = json.dumps({"examples": examples}).encode()
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / quality_data.ARCHIVE, "w:gz") as tar:
        member = tarfile.TarInfo("bigbench-1.0.0/bigbench/benchmark_tasks/gem/e2e_nlg/task.json")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return hashlib.sha256((folder / quality_data.ARCHIVE).read_bytes()).hexdigest()


def test_each_input_has_its_first_reference_and_another_archive_is_refused(tmp_path, monkeypatch):
    known = archive(tmp_path, [{"input": "a", "target": ["one", "two"]}, {"input": "b", "target": "three"}])
    with pytest.raises(ValueError, match=f"checksum {known}"):
        bigbench_examples("e2e_nlg", tmp_path)
    monkeypatch.setattr(quality_data, "ARCHIVE_SHA256", known)
    assert bigbench_examples("e2e_nlg", tmp_path) == [Example("a", "one"), Example("b", "three")]


def test_a_cell_counts_for_its_own_configuration_only(tmp_path):
    cells = Cells(tmp_path / "cells")
    cell = Cell(name="a", configuration={"steps": 3, "sites": ("q", "v")})
    assert cells.find(cell) is None
    cells.keep(cell, {"loss": 0.5})
    assert Cells(tmp_path / "cells").find(cell) == {"loss": 0.5}
    assert cells.find(Cell(name="a", configuration={"steps": 4, "sites": ("q", "v")})) is None
    cells.clear()
    assert cells.find(cell) is None


def test_weights_come_back_under_their_own_names(tmp_path):
    weights = {
        TensorKey(3, TensorKind.LORA_A): torch.rand(2, 5),
        TensorKey(3, TensorKind.MODULE, 2): torch.rand(4, dtype=torch.float64),
    }
    cells = Cells(tmp_path)
    cells.keep_weights("a", weights)
    back = cells.weights("a")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], value) for key, value in weights.items())


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, imported as when it is run by its path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quality

    yield quality
    for name in ("quality", "quality_studies", "quality_report"):
        sys.modules.pop(name)


def study(quality: ModuleType, **changes: object) -> object:
    fields = {
        "name": "small",
        "base_model": "model",
        "task": {"kind": "causal_lm"},
        "training": EXAMPLES[16:],
        "validation": EXAMPLES[8:16],
        "held_out": EXAMPLES[:8],
        "steps": 5,
        "max_length": 16,
        "target_modules": ("q_proj",),
        "optimizer": {},
        "rates": {},
        "chosen": CHOSEN,
        "metric": "loss",
        "exact_steps": 2,
        "exact_bound": 1e-6,
    }
    return quality.Study(**{**fields, **changes})


def test_eight_tenants_see_together_what_the_joint_job_sees(quality):
    small = study(quality)
    joint, tenants = small.job("lora", 1), small.tenants(1, together=True)
    rows = Counter(line for tenant in tenants for line in tenant.training.splitlines())
    assert rows == Counter(joint.training.splitlines())
    assert (
        len(tenants) == sum(tenant.spec.rows_per_step for tenant in tenants) == joint.spec.rows_per_step == 8
    )
    assert {tenant.spec.steps for tenant in tenants} == {joint.spec.steps}
    assert len({tenant.spec.seed for tenant in tenants}) == 8
    assert {tenant.spec.mode for tenant in tenants} == {"merged"}
    assert not set(joint.training.splitlines()) & set(joint.held_out.splitlines())


def test_every_cell_is_planned_once_and_the_first_seed_comes_first(quality):
    plan = list(quality.plan(("a", "b"), (4, 5, 6)))
    assert len(set(plan)) == len(plan) == 2 * (len(quality.ARMS) * 3 - 2), "float64 of the first seed only"
    assert [(name, seed) for name, arm, seed in plan if arm == "full"][:2] == [("a", 4), ("b", 4)]


def test_a_second_run_makes_only_what_is_missing(quality, tmp_path):
    cells, made = Cells(tmp_path), []

    def train():
        made.append(1)
        return {"measures": {"loss": 0.25}}, {TensorKey(0, TensorKind.LORA_A): torch.ones(1, 1)}

    cell = quality.cell_of(study(quality), "lora", 0)
    first = quality.make(cells, cell, train)
    assert quality.make(Cells(tmp_path), cell, train) == first
    assert len(made) == 1
    longer = quality.cell_of(study(quality, steps=6), "lora", 0)
    other_data = quality.cell_of(study(quality, held_out=EXAMPLES[:7]), "lora", 0)
    quality.make(cells, longer, train)
    quality.make(cells, other_data, train)
    assert len(made) == 3, "other steps, and other rows, are another result"


def test_a_rate_concerns_only_its_own_arm(quality):
    slower = study(quality, chosen=CHOSEN | {"linear": 5e-5})
    changed = {
        arm
        for arm in quality.ARMS
        if quality.cell_of(study(quality), arm, 0) != quality.cell_of(slower, arm, 0)
    }
    assert changed == {"linear"}


def test_the_table_says_how_many_seeds_are_there(quality, tmp_path):
    from quality_report import summary, table

    cells, small = Cells(tmp_path), study(quality)
    for seed, loss in enumerate((1.0, 1.5, 2.0)):
        cells.keep(quality.cell_of(small, "full", seed), {"measures": {"loss": loss, "perplexity": 2 * loss}})
    cells.keep(quality.cell_of(small, "mlp", 1), {"measures": {"loss": 3.0, "perplexity": 4.0}})
    results = summary(cells, [small], (0, 1, 2))
    lines = {line.split("|")[1].strip(): line for line in table(results).splitlines()}
    assert "1.5000 ± 0.5000 | 3.0000 ± 1.0000" in lines["full fine-tuning"]
    assert "3.0000 (1 seed)" in lines["MLP"]
    assert lines["Linear"].count("missing") == 2
    assert "small-mlp-0" in results["missing"] and "small-mlp-1" not in results["missing"]
    assert results["within_bounds"]


def test_an_adapter_that_left_peft_is_out_of_bounds(quality, tmp_path):
    from quality_report import summary

    cells, small = Cells(tmp_path), study(quality)
    weight = torch.ones(4, 4)
    for arm, value in (("peft", weight), ("lora", weight * (1 + 2e-4))):
        cell = quality.cell_of(small, arm, 0)
        cells.keep_weights(cell.name, {TensorKey(0, TensorKind.LORA_A): value})
        cells.keep(cell, {"measures": {"loss": 1.0, "perplexity": 2.0}, "untrained": {}})
    results = summary(cells, [small], (0,))
    assert results["coincidence"]["small"]["lora_tensors"] == pytest.approx(2e-4, rel=1e-3)
    assert not results["within_bounds"]
