"""Trains tenants mixed through the whole service and each alone with peft, and compares the adapters.

The mixed side is the real path: SDK, coordinator, Ray actors, gRPC streams, devices, exported folders.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from cola_runtime.adapter_spec import HEAD_NAME
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.adapters.adapter_files import HEAD_FILE, read_adapter_folder
from cola_runtime.adapters.folder_files import CONFIG_FILE
from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.config import BaseModelSettings, DeviceSettings, SchedulerSettings, ServiceSettings
from cola_runtime.data.cursor import step_rows, total_steps
from cola_runtime.data.formats import parse_dataset
from cola_runtime.data.tokenize import Tokenizer, longest_row
from cola_runtime.jobs.plan import training_plan
from cola_runtime.rows import Row
from cola_runtime.runtime.coordinator import RunningService, running_service
from cola_runtime.spec import JobSpec
from cola_runtime.testing.ordinary_modules import train_ordinary
from cola_runtime.testing.peft_reference import Recipe, relative_difference, train_alone
from cola_runtime.testing.sequence_reference import train_sequence_alone
from cola_runtime.types import BaseModelDescription, TensorKey, TensorKind

JOB_TIMEOUT_SECONDS = 3600.0

Weights = dict[TensorKey, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedJob:
    """One tenant's job and its JSONL."""

    spec: JobSpec
    training: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedRun:
    """The adapters that the service exported, by job name, and what base model made them."""

    base: BaseModelDescription
    weights: dict[str, Weights]
    base_steps: int  # fewer than the jobs' steps together: that is how much was mixed


def service_for(
    folder: Path,
    *,
    model: Path,
    name: str,
    dtype: str,
    attention: str = "sdpa",
    token_budget: int = 1024,
    threads: int = 1,
) -> ServiceSettings:
    """A service on this machine with two devices, its data in `folder`, on a free port."""
    return ServiceSettings(
        data_dir=folder,
        listen="127.0.0.1:0",
        base_models=(
            BaseModelSettings.model_validate(
                {"name": name, "path": model, "dtype": dtype, "attention": attention, "threads": threads}
            ),
        ),
        devices=DeviceSettings(count=2),
        scheduler=SchedulerSettings(token_budget=token_budget),
    )


async def train_mixed(settings: ServiceSettings, jobs: Sequence[MixedJob]) -> MixedRun:
    """Submit every job as a tenant of its own, all at once, and read back the exported adapters."""
    async with running_service(settings) as service, AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(await tenant_client(service, job.spec.name)) for job in jobs
        ]
        handles = [
            await client.submit(job.spec, training=job.training)
            for client, job in zip(clients, jobs, strict=True)
        ]
        for handle in handles:
            await handle.wait(JOB_TIMEOUT_SECONDS)
        weights = {
            handle.name: exported_weights(
                await handle.download_adapter(settings.data_dir / handle.name), service.base_model
            )
            for handle in handles
        }
        overview = await clients[0].describe()
        return MixedRun(base=service.base_model, weights=weights, base_steps=overview.base_steps)


def train_reference(job: MixedJob, base: BaseModelDescription, model: Path, *, attention: str) -> Weights:
    """The same job by stock peft, or transformers' classification model, and torch.optim, alone. One LoRA."""
    recipe = recipe_for(job, base, model)
    train = train_alone if recipe.spec.head is None else train_sequence_alone
    return train(model, recipe, dtype=base.dtype, attention=attention).weights


def train_modules(job: MixedJob, base: BaseModelDescription, model: Path, *, attention: str) -> Weights:
    """The same job of any adapter kinds by ordinary modules and torch.optim, alone."""
    return train_ordinary(model, recipe_for(job, base, model), dtype=base.dtype, attention=attention).weights


def recipe_for(job: MixedJob, base: BaseModelDescription, model: Path) -> Recipe:
    """What the service trains, as one adapter alone: the same initial weights, rows, order and schedule."""
    rows = tokenized(job.training, job.spec, base)
    steps = total_steps(len(rows), job.spec)
    plan = training_plan(job.spec, base, total_steps=steps)
    batches = [[row for part in step_rows(rows, job.spec, step) for row in part] for step in range(steps)]
    return Recipe(
        spec=plan.adapter,
        initial_weights=initial_weights(plan.adapter),
        steps=batches,
        optimizer=plan.optimizer,
        schedule=plan.schedule,
    )


def tokenized(content: bytes, spec: JobSpec, base: BaseModelDescription) -> tuple[Row, ...]:
    """A job's JSONL as its rows."""
    return (
        Tokenizer.of(base)
        .tokenize(
            parse_dataset(content, file_name="rows.jsonl"),
            max_length=longest_row(spec, context_length=base.context_length),
            truncate=spec.truncate,
            loss=spec.loss,
            task=spec.task,
        )
        .rows
    )


def largest_difference(mixed: Weights, alone: Weights) -> float:
    """Largest relative difference over the adapter's tensors (norm of difference over norm)."""
    return max(relative_difference(mixed, alone).values())


def four_tenants(base_model: str, *, steps: int, encoding: str, seed: int = 0) -> list[MixedJob]:
    """Different ranks, targets, rates, batch sizes and intervals; byte-sized rows for tiny models."""
    common = {"base_model": base_model, "steps": steps, "encoding": encoding}
    specs = [
        {"adapter": {"rank": 2, "alpha": 4}, "rows_per_step": 2, "optimizer": {"learning_rate": 1e-3}},
        {
            "adapter": {"rank": 4, "alpha": 8, "target_modules": "attention"},
            "rows_per_step": 3,
            "optimizer": {"learning_rate": 5e-4, "max_grad_norm": 0.5},
            "schedule": {"kind": "linear", "warmup_steps": 3},
        },
        {
            "adapter": {"rank": 8, "alpha": 8, "target_modules": "mlp"},
            "rows_per_step": 4,
            "adaptation_interval": 2,
            "optimizer": {"learning_rate": 2e-3, "weight_decay": 0.01},
        },
        {
            "adapter": {"rank": 4, "alpha": 16, "use_rslora": True},
            "rows_per_step": 2,
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"kind": "cosine", "warmup_steps": 2},
        },
    ]
    return [
        MixedJob(
            spec=JobSpec.model_validate(
                {"name": f"{encoding.replace('_', '-')}-{number}", "seed": seed + number, **common, **spec}
            ),
            training=_sentences(number, seed=seed),
        )
        for number, spec in enumerate(specs)
    ]


def _sentences(number: int, *, seed: int, rows: int = 24) -> bytes:
    random = np.random.default_rng([seed, number])
    words = ("river", "stone", "amber", "cloud", "seven", "north", "glass", "paper", "quiet", "lemon")
    lines = [
        {
            "prompt": " ".join(random.choice(words, size=random.integers(2, 5))) + ": ",
            "completion": " ".join(random.choice(words, size=random.integers(1, 4))),
        }
        for _ in range(rows)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


async def tenant_client(service: RunningService, tenant: str) -> AsyncClient:
    """A client with a new tenant's key."""
    await service.store.create_tenant(tenant)
    key = await service.store.create_key(tenant)
    return AsyncClient(base_url=f"grpc://{service.endpoint}", api_key=key)


def exported_weights(folder: Path, base: BaseModelDescription) -> Weights:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = dict(read_adapter_folder(files, base.sites).weights) if CONFIG_FILE in files else {}
    if HEAD_FILE in files:
        head = safetensors.numpy.load(files[HEAD_FILE])
        for kind in (TensorKind.WEIGHT, TensorKind.BIAS):
            weights[TensorKey(len(base.sites), kind)] = head[f"{HEAD_NAME}/{kind.name.lower()}"]
    return {key: torch.from_numpy(array) for key, array in weights.items()}
