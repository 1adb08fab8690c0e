"""Does ColA train real models as well as peft and full fine-tuning, and what do its kinds and modes give?

    python benchmarks/quality.py [--quick|--report|--sweep] [--fresh] [--json] [--seed N] [--pictures FOLDER]

Three data sets: films' sentiment on MiniLM, E2E NLG and WebNLG on SmolLM2 (quality_studies.py). Arms, for
three seeds from N on: full fine-tuning, peft's LoRA, and through the whole service in this process ColA's
LoRA, linear and MLP adapters, LoRA at adaptation intervals 2, 4 and 8, and eight tenants with a share of the
data each, alone or in collaboration. `lora` is the joint one. All see 8 rows a step, for as many steps.

Each result is kept as a file under benchmarks/results/quality as soon as it is there; another run goes on
with what is missing (--fresh makes all of them again, --report none). --sweep tries learning rates on
validation rows instead. --quick: a few steps of two tenants mixed on MiniLM against peft. LoRA must coincide
with peft's.

Optimizers are AdamW with RoBERTa's and Llama 2's settings: at eps 1e-8 a float32 rounding that turns the sign
of a tiny gradient costs twice the rate, whoever computes it (exactness.py).
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from quality_report import draw, summary, table
from quality_studies import BOUND, INTERVALS, Study, cell_of, film_tenants, studies

from cola_runtime.base_model.pretrained import MINILM, resolve_base_model
from cola_runtime.testing.cells import Cell, Cells
from cola_runtime.testing.exactness import MixedJob, Weights, largest_difference
from cola_runtime.testing.quality_arms import (
    Trained,
    describe_base,
    measures_with,
    train_fully,
    train_in_service,
    train_with_peft,
)
from cola_runtime.testing.record import RESULTS_FOLDER, argument_parser, emit, record
from cola_runtime.types import BaseModelDescription

SEEDS = 3
SWEEP_SEED = 100
FOLDER = RESULTS_FOLDER / "quality"
QUICK = {"steps": 6, "held_out": 48}


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--fresh", action="store_true", help="make every result again")
    parser.add_argument("--sweep", action="store_true", help="try the learning rates on validation rows")
    parser.add_argument("--report", action="store_true", help="make nothing: only say what is there")
    parser.add_argument(
        "--pictures", type=Path, help="draw quality.png and quality_loss.png into this folder"
    )
    arguments = parser.parse_args()
    started = datetime.now(UTC)
    torch.set_num_threads(1)
    if arguments.quick:
        results = quick(arguments.seed)
    else:
        cells = Cells(FOLDER)
        if arguments.fresh:
            cells.clear()
        seeds = tuple(range(arguments.seed, arguments.seed + SEEDS))
        if not arguments.sweep and not arguments.report:
            make_all(cells, seeds)
        results = sweep(cells) if arguments.sweep else report(cells, seeds, arguments.pictures)
    emit(record("quality", results, seed=arguments.seed, started=started), arguments.json)
    if not results["within_bounds"]:
        raise SystemExit("a difference is above its bound")


def quick(seed: int) -> dict[str, Any]:
    """Two tenants mixed in one service, then each alone with peft."""
    path = resolve_base_model(MINILM, Path(".cache/models"))
    tenants = film_tenants(**QUICK, seed=seed)
    base, mixed = in_service(tenants, path)
    alone = {job.spec.name: train_with_peft(job, base, path) for job in tenants}
    difference = max(largest_difference(mixed[name].weights, alone[name].weights) for name in alone)
    return {
        "max_relative_difference": difference,
        "within_bounds": difference <= BOUND,
        "bound": BOUND,
        "cola": {name: each.measures for name, each in mixed.items()},
        "peft": {name: each.measures for name, each in alone.items()},
        **QUICK,
    }


Made = tuple[dict[str, Any], Weights]
"""A cell's result, and the adapter if it is to be compared with others."""
Arm = Callable[[Study, int], Made]


def make_all(cells: Cells, seeds: tuple[int, ...]) -> None:
    by_name = {study.name: study for study in studies()}
    for name, arm, seed in plan(tuple(by_name), seeds):
        make(cells, cell_of(by_name[name], arm, seed), partial(ARMS[arm], by_name[name], seed))


def report(cells: Cells, seeds: tuple[int, ...], pictures: Path | None) -> dict[str, Any]:
    """What the cells say; those that are missing are named."""
    found = studies()
    results = summary(cells, found, seeds)
    print(table(results), flush=True)
    if pictures is not None:
        draw(results, cells, found, pictures)
    return results


def plan(names: tuple[str, ...], seeds: tuple[int, ...]) -> Iterator[tuple[str, str, int]]:
    """(study, arm, seed): what says most for its time comes first, LoRA's intervals last."""
    intervals = [f"interval-{interval}" for interval in INTERVALS]
    main = [arm for arm in ARMS if arm not in (*intervals, "float64")]
    late = [*intervals, "float64"]
    yield from ((name, arm, seeds[0]) for name in names for arm in main)
    yield from ((names[0], arm, seeds[0]) for arm in late)
    yield from ((names[0], arm, seed) for seed in seeds[1:] for arm in (*main, *intervals))
    yield from ((name, arm, seeds[0]) for name in names[1:] for arm in late)
    yield from ((name, arm, seed) for seed in seeds[1:] for name in names[1:] for arm in main)
    yield from ((name, arm, seed) for seed in seeds[1:] for name in names[1:] for arm in intervals)


def make(cells: Cells, cell: Cell, train: Callable[[], Made]) -> dict[str, Any]:
    """The cell's result; made and kept if it is not there."""
    result = cells.find(cell)
    if result is None:
        print(f"{datetime.now(UTC):%H:%M:%S} {cell.name} ...", end=" ", flush=True)
        begin, cpu = time.perf_counter(), time.process_time()
        result, weights = train()
        if weights:
            cells.keep_weights(cell.name, weights)
        result["seconds"] = round(time.perf_counter() - begin, 1)
        result["cpu_seconds"] = round(time.process_time() - cpu, 1)
        result["load_average"] = round(os.getloadavg()[0], 2)
        cells.keep(cell, result)
        print(result.get("measures", result), f"{result['seconds']} s", flush=True)
    return result


def peft_arm(study: Study, seed: int) -> Made:
    trained = train_with_peft(study.job("lora", seed), base_of(study.path, study.base_model), study.path)
    return result_of(trained), trained.weights


def full_arm(study: Study, seed: int) -> Made:
    return result_of(
        train_fully(study.job("full", seed), base_of(study.path, study.base_model), study.path)
    ), {}


def runtime_arm(kind: str, interval: int = 1) -> Callable[[Study, int], Made]:
    def train(study: Study, seed: int) -> Made:
        job = study.job(kind, seed, interval=interval)
        trained = in_service([job], study.path)[1][job.spec.name]
        return result_of(trained), trained.weights if kind == "lora" else {}

    return train


def tenants_arm(*, together: bool) -> Callable[[Study, int], Made]:
    """Alone, a tenant's function is its own adapter's; together, and for comparison, it is the mean of all.

    A head stays its tenant's own, so the mean of all is judged once a tenant where there are heads.
    """

    def train(study: Study, seed: int) -> Made:
        base, trained = in_service(study.tenants(seed, together=together), study.path)
        adapters = [each.weights for each in trained.values()]
        judged = study.job("lora", seed)
        heads = adapters if study.task["kind"] != "causal_lm" else adapters[:1]
        mean = [measures_with(judged, base, study.path, adapters, head) for head in heads]
        steps = zip(*(each.losses for each in trained.values()), strict=True)
        result = {"losses": [statistics.fmean(losses) for losses in steps]}
        if together:
            return {**result, "measures": mean_of(mean), "tenants": mean}, {}
        own = [measures_with(judged, base, study.path, [each], each) for each in adapters]
        return {**result, "measures": mean_of(own), "tenants": own, "merged": mean_of(mean)}, {}

    return train


def float64_arm(study: Study, seed: int) -> Made:
    """A few steps of LoRA in float64, by the runtime and by peft."""
    few = replace(study, steps=study.exact_steps, held_out=study.held_out[:8])
    job = few.job("lora", seed)
    base, trained = in_service([job], study.path, dtype="float64")
    ours, theirs = trained[job.spec.name], train_with_peft(job, base, study.path)
    return {
        "max_relative_difference": largest_difference(ours.weights, theirs.weights),
        "loss_relative_difference": abs(ours.measures["loss"] / theirs.measures["loss"] - 1),
    }, {}


ARMS: dict[str, Arm] = {
    "peft": peft_arm,
    "lora": runtime_arm("lora"),
    "full": full_arm,
    "linear": runtime_arm("linear"),
    "mlp": runtime_arm("mlp"),
    "alone": tenants_arm(together=False),
    "collaboration": tenants_arm(together=True),
    **{f"interval-{interval}": runtime_arm("lora", interval) for interval in INTERVALS},
    "float64": float64_arm,
}


def sweep(cells: Cells) -> dict[str, Any]:
    """Each learning rate, with a seed that is used for nothing else, judged on validation rows."""
    found: dict[str, Any] = {}
    for study in studies():
        for kind, rates in study.rates.items():
            for rate in rates:
                tried = replace(study, chosen={kind: rate}, held_out=study.validation)
                cell = cell_of(tried, f"sweep-{kind}-{rate:g}", SWEEP_SEED)
                result = make(cells, cell, partial(SWEPT[kind], tried, SWEEP_SEED))
                measure = result["measures"][study.metric]
                found.setdefault(study.name, {}).setdefault(kind, {})[f"{rate:g}"] = measure
    return {"sweep": found, "within_bounds": True}


SWEPT: dict[str, Arm] = {"lora": peft_arm, "full": full_arm, "linear": ARMS["linear"], "mlp": ARMS["mlp"]}


@cache
def base_of(path: Path, name: str) -> BaseModelDescription:
    return describe_base(path, name, "float32")


def in_service(
    jobs: Sequence[MixedJob], path: Path, *, dtype: str = "float32"
) -> tuple[BaseModelDescription, dict[str, Trained]]:
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(train_in_service(Path(folder), path, jobs, dtype=dtype))


def result_of(trained: Trained) -> dict[str, Any]:
    return {"measures": trained.measures, "untrained": trained.untrained, "losses": trained.losses}


def mean_of(measures: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(each[name] for each in measures) for name in measures[0]}


if __name__ == "__main__":
    main()
