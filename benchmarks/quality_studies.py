"""The data sets of quality.py, how each is trained, and the job of every arm. Loaded beside it, by path."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cola_runtime.base_model.pretrained import MINILM, SMOLLM2, prepare_smollm2, resolve_base_model
from cola_runtime.data.tokenize import Tokenizer
from cola_runtime.spec import JobSpec
from cola_runtime.testing.cells import Cell
from cola_runtime.testing.exactness import MixedJob
from cola_runtime.testing.quality_arms import HeldOutJob
from cola_runtime.testing.quality_data import (
    SENTIMENTS,
    Example,
    bigbench_examples,
    film_sentiments,
    rated_films,
    shards,
    split_by_input,
)

MODELS, DATA = Path(".cache/models"), Path(".cache/data")
TENANTS = 8
SPLIT_SEED = 0  # of the parts and the tenants' shares: the same for every seed of training
GROUP = "the-eight-tenants-of-quality"  # of a service in this process, which nobody else reaches
Rates = tuple[float, ...]
INTERVALS = (2, 4, 8)
BOUND = (
    1e-4  # of a trained tensor's relative difference from peft's in float32: exactness.py's for real models
)
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 8, "alpha": 16},
    "linear": {"kind": "linear"},
    "mlp": {"kind": "mlp", "hidden": 128},
}
ROBERTA_ADAMW = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01}  # arXiv:1907.11692
LLAMA_2_ADAMW = {"betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.1, "max_grad_norm": 1.0}  # 2307.09288


@dataclass(frozen=True, kw_only=True)
class Study:
    """One data set and how it is trained: the same for every arm but the learning rate."""

    name: str
    base_model: str
    task: dict[str, Any]
    training: Sequence[Example]
    validation: Sequence[Example]  # learning rates were chosen on it
    held_out: Sequence[Example]
    steps: int
    max_length: int
    target_modules: tuple[str, ...]
    optimizer: dict[str, Any]
    rates: dict[str, Rates]  # tried, by kind of training; "full" is full fine-tuning
    chosen: dict[str, float]  # of those; for tenants with a row a step LoRA's over the root of 8
    metric: str
    exact_steps: int  # of the comparison in float64
    exact_bound: float  # and its bound

    @cached_property
    def path(self) -> Path:
        return resolve_base_model(self.base_model, MODELS)

    def spec(self, kind: str, seed: int, **changes: Any) -> JobSpec:
        fields = {
            "name": f"{self.name}-{kind}",
            "base_model": self.base_model,
            "task": self.task,
            "adapter": {**KINDS.get(kind, KINDS["lora"]), "target_modules": self.target_modules},
            "optimizer": {**self.optimizer, "learning_rate": self.chosen[kind]},
            "schedule": {"kind": "linear", "warmup_steps": max(1, self.steps // 10)},
            "steps": self.steps,
            "rows_per_step": TENANTS,
            "max_length": self.max_length,
            "truncate": True,
            "seed": seed,
            "checkpoint_every": self.steps,
            "evaluation": {"keep_best": False},
        }
        return JobSpec.model_validate({**fields, **changes})

    def job(self, kind: str, seed: int, *, interval: int = 1) -> HeldOutJob:
        """One adapter on all tenants' data."""
        spec = self.spec(kind, seed, adaptation_interval=interval)
        return HeldOutJob(spec=spec, training=self.lines(self.training), held_out=self.lines(self.held_out))

    def tenants(self, seed: int, *, together: bool) -> list[MixedJob]:
        """Eight tenants with a share of the data each and a row a step: together as many rows as `job`."""
        arm = "collaboration" if together else "alone"
        common = {"rows_per_step": 1, **({"collaboration": {"group": GROUP}} if together else {})}
        return [
            MixedJob(
                spec=self.spec(arm, seed * TENANTS + number, **common, name=f"tenant-{number}"),
                training=self.lines(share),
            )
            for number, share in enumerate(shards(self.training, TENANTS, seed=SPLIT_SEED))
        ]

    def lines(self, examples: Sequence[Example]) -> bytes:
        rows = ({"prompt": f"{e.input}\n", "completion": e.target} for e in examples)
        if self.task["kind"] != "causal_lm":
            rows = ({"text": e.input, "label": e.target} for e in examples)
        return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def cell_of(study: Study, arm: str, seed: int) -> Cell:
    """Where the arm's result is kept, and what it depends on beside the code."""
    kind = arm.removeprefix("sweep-").split("-")[0]
    texts = json.dumps([[[e.input, e.target] for e in part] for part in (study.training, study.held_out)])
    configuration = {
        "arm": arm,
        "seed": seed,
        "spec": study.spec(kind if kind in study.chosen else "lora", seed).model_dump(
            mode="json", exclude_unset=True
        ),
        "data_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        "exact_steps": study.exact_steps if arm == "float64" else None,
    }
    return Cell(name=f"{study.name}-{arm}-{seed}", configuration=configuration)


def films() -> Study:
    held_out, validation, training = split_by_input(
        film_sentiments(rated_films()), (200, 200), seed=SPLIT_SEED
    )
    return Study(
        name="films",
        base_model=MINILM,
        task={"kind": "sequence_classification", "labels": SENTIMENTS},
        training=training[:1000],  # of 8,773; the steps take 480
        validation=validation,
        held_out=held_out,
        steps=60,
        max_length=32,
        target_modules=("query", "value"),
        optimizer=ROBERTA_ADAMW,
        rates={
            "mlp": (1e-3, 3e-3, 1e-2),
            "linear": (3e-4, 1e-3, 3e-3),
            "lora": (2e-3, 6e-3),
            "full": (1e-4, 3e-4),
        },
        chosen={
            "lora": 6e-3,
            "linear": 1e-3,
            "mlp": 3e-3,
            "full": 1e-4,
            "alone": 2e-3,
            "collaboration": 2e-3,
        },
        metric="accuracy",
        exact_steps=10,
        exact_bound=1e-9,
    )


def generation(name: str, task: str) -> Study:
    """E2E or WebNLG, rows of at most 48 tokens: longer ones are left out."""
    longest = 48
    tokenizer = Tokenizer(prepare_smollm2(MODELS))
    examples = [
        each
        for each in bigbench_examples(task, DATA)
        if len(tokenizer.encode_prompt(f"{each.input}\n")) + len(tokenizer.encode_prompt(str(each.target)))
        < longest
    ]
    held_out, validation, training = split_by_input(examples, (32, 24), seed=SPLIT_SEED)
    return Study(
        name=name,
        base_model=SMOLLM2,
        task={"kind": "causal_lm"},
        training=training,
        validation=validation,
        held_out=held_out,
        steps=12,
        max_length=longest,
        target_modules=("q_proj", "v_proj"),
        optimizer=LLAMA_2_ADAMW,
        rates={},  # not tried: a try costs as much as a result
        chosen={
            "lora": 4e-3,
            "linear": 4e-4,
            "mlp": 2e-3,
            "full": 5e-5,
            "alone": 1.4e-3,
            "collaboration": 1.4e-3,
        },
        metric="loss",
        exact_steps=3,
        exact_bound=1e-6,  # transformers keeps Llama's norms and rotary tables in float32: exactness.py
    )


def studies() -> list[Study]:
    return [films(), generation("e2e", "e2e_nlg"), generation("webnlg", "webnlg_en")]


def film_tenants(*, steps: int, held_out: int, seed: int) -> list[HeldOutJob]:
    """Two tenants of different tasks: negative or positive, and the rating over 4."""
    kinds = films()
    rated = [Example(film.input, float(film.target) / 4) for film in rated_films()]
    validation, training = split_by_input(rated, (held_out,), seed=SPLIT_SEED)
    grades = replace(
        kinds, name="grades", task={"kind": "regression"}, training=training, held_out=validation
    )
    few = replace(kinds, held_out=kinds.held_out[:held_out])
    return [replace(study, steps=steps).job("lora", seed) for study in (few, grades)]
