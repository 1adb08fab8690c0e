"""One job trained by the runtime, by peft, or by full fine-tuning, and judged on the same held-out rows.

All sides have the same initial weights, rows, optimizer and schedule, and no dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cola_runtime.adapter_spec import AdapterSpec, LoraKind
from cola_runtime.adapters.schedule import learning_rate
from cola_runtime.base_model.model import TappedModel
from cola_runtime.data.metrics import evaluate
from cola_runtime.jobs.plan import training_plan
from cola_runtime.rows import Row
from cola_runtime.spec import JobSpec
from cola_runtime.task_spec import CausalLmTask, ClassificationTask
from cola_runtime.testing.exactness import (
    MixedJob,
    Weights,
    exported_weights,
    recipe_for,
    service_for,
    tenant_client,
    tokenized,
)
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.ordinary_modules import add_adapter, wide_norms
from cola_runtime.testing.peft_reference import (
    Recipe,
    adapter_parameters,
    batch_loss,
    descend,
    peft_model,
    torch_optimizer,
)
from cola_runtime.testing.sequence_reference import sequence_model, sequence_output
from cola_runtime.types import BaseModelDescription, TensorKey, TensorKind

WAIT_SECONDS = 7200.0
_EVALUATED_ROWS = 32  # at a time
_LossOf = Callable[[Sequence[Row]], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutJob(MixedJob):
    """A job with its held-out rows, JSONL."""

    held_out: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    weights: Weights  # empty after full fine-tuning
    losses: list[float]  # of each step's rows, before the step
    measures: dict[str, float]  # on the held-out rows; empty if they were not evaluated
    untrained: dict[str, float]  # the same before the first step; the runtime's alone


def describe_base(path: Path, name: str, dtype: Any) -> BaseModelDescription:
    """What the runtime's service would say of a base model."""
    return TappedModel.load(path, dtype=dtype, threads=1).describe(name, "")


async def train_in_service(
    folder: Path, path: Path, jobs: Sequence[MixedJob], *, dtype: str
) -> tuple[BaseModelDescription, dict[str, Trained]]:
    """Every job as a tenant of its own, all at once, mixed in one service in this process."""
    settings = service_for(folder / "service", model=path, name=jobs[0].spec.base_model, dtype=dtype)
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        handles = []
        for job in jobs:
            client = await stack.enter_async_context(await tenant_client(service, job.spec.name))
            held_out = job.held_out if isinstance(job, HeldOutJob) else None
            handles.append(await client.submit(job.spec, training=job.training, evaluation=held_out))
        trained = {}
        for handle in handles:
            await handle.wait(WAIT_SECONDS)
            exported = await handle.download_adapter(folder / handle.name)
            evaluations = await handle.evaluations()
            trained[handle.name] = Trained(
                weights=exported_weights(exported, service.base_model),
                losses=[step.loss for step in await handle.metrics()],
                measures=dict(evaluations[-1].metrics) if evaluations else {},
                untrained=dict(evaluations[0].metrics) if evaluations else {},
            )
        return service.base_model, trained


def train_with_peft(job: HeldOutJob, base: BaseModelDescription, path: Path) -> Trained:
    """The same LoRA by peft and torch.optim, alone."""
    recipe = recipe_for(job, base, path)
    if isinstance(job.spec.task, CausalLmTask):
        model = peft_model(path, recipe.spec, dtype=base.dtype)
        if base.dtype == "float64":
            wide_norms(model)
        parameters: dict[TensorKey, Tensor] = dict(adapter_parameters(model, recipe.spec))
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(recipe.initial_weights[key])
    else:
        model, parameters = _peft_classifier(path, recipe, dtype=base.dtype)
    losses = _descend_all(list(parameters.values()), recipe, _loss_of(model, job.spec))
    return Trained(
        weights={key: parameter.detach() for key, parameter in parameters.items()},
        losses=losses,
        measures=held_out_measures(model, job, base, path),
        untrained={},
    )


def train_fully(job: HeldOutJob, base: BaseModelDescription, path: Path) -> Trained:
    """Full fine-tuning: every weight of the stock model, and the task's head; no adapter."""
    recipe = recipe_for(job, base, path)
    model = _stock_model(path, recipe.spec, recipe.initial_weights, dtype=base.dtype).requires_grad_(True)
    losses = _descend_all(list(model.parameters()), recipe, _loss_of(model, job.spec))
    return Trained(
        weights={}, losses=losses, measures=held_out_measures(model, job, base, path), untrained={}
    )


def measures_with(
    job: HeldOutJob, base: BaseModelDescription, path: Path, adapters: Sequence[Weights], head: Weights
) -> dict[str, float]:
    """Held-out measures of the stock model with the mean of LoRA adapters, and one's head if there is any."""
    spec = training_plan(job.spec, base, total_steps=1).adapter
    model = _stock_model(path, spec, head, dtype=base.dtype)
    for weights in adapters:
        add_adapter(model, spec, _scaled(weights, 1 / len(adapters)))
    return held_out_measures(model, job, base, path)


def _scaled(weights: Weights, factor: float) -> Weights:
    """LoRA's output is linear in B."""
    return {key: value * factor if key.kind is TensorKind.LORA_B else value for key, value in weights.items()}


def _stock_model(path: Path, spec: AdapterSpec, weights: Mapping[TensorKey, Tensor], *, dtype: str) -> Any:
    """Frozen, in evaluation mode; with the task's head if the adapter has one."""
    if spec.head is not None:
        head_only = AdapterSpec(parts=spec.parts[-1:], seed=spec.seed, dtype=spec.dtype)
        return sequence_model(path, head_only, weights, dtype=dtype)[0]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    return model.requires_grad_(False).eval()


def _peft_classifier(path: Path, recipe: Recipe, *, dtype: str) -> tuple[Any, dict[TensorKey, Tensor]]:
    """Stock model, peft's LoRA, and peft's trainable copy of the classifier, all with our initial weights."""
    from peft import LoraConfig, get_peft_model

    spec, weights = recipe.spec, recipe.initial_weights
    assert spec.head is not None
    site = spec.head[1].index
    lora = AdapterSpec(parts=spec.parts[:1], seed=spec.seed, dtype=spec.dtype)
    kind = lora.parts[0].kind
    assert isinstance(kind, LoraKind)
    config = LoraConfig(
        r=kind.rank,
        lora_alpha=kind.alpha,
        target_modules=[each.name for each in lora.sites],
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    stock = _stock_model(path, spec, weights, dtype=dtype)
    model = get_peft_model(stock, config, autocast_adapter_dtype=False).eval()
    parameters: dict[TensorKey, Tensor] = dict(adapter_parameters(model, lora))
    for key, parameter in parameters.items():
        parameter.data = weights[key].clone()
    classifier = model.get_base_model().classifier.modules_to_save["default"]
    parameters[TensorKey(site, TensorKind.WEIGHT)] = classifier.weight
    parameters[TensorKey(site, TensorKind.BIAS)] = classifier.bias
    return model.get_base_model(), parameters


def _loss_of(model: Any, spec: JobSpec) -> _LossOf:
    if isinstance(spec.task, CausalLmTask):
        return lambda rows: batch_loss(model, rows)
    return lambda rows: _own_loss(model, rows)


def _own_loss(model: Any, rows: Sequence[Row]) -> Tensor:
    loss: Tensor = sequence_output(model, rows).loss
    return loss


def _descend_all(parameters: Sequence[Tensor], recipe: Recipe, loss_of: _LossOf) -> list[float]:
    optimizer = torch_optimizer(recipe.optimizer, parameters)
    losses = []
    for step, rows in enumerate(recipe.steps):
        loss = loss_of(rows)
        descend(loss, optimizer, recipe, learning_rate(recipe.schedule, recipe.optimizer.learning_rate, step))
        losses.append(loss.item())
    return losses


@torch.no_grad()
def held_out_measures(
    model: Any, job: HeldOutJob, base: BaseModelDescription, path: Path
) -> dict[str, float]:
    """As the runtime's own evaluation, by the stock model's forward pass."""
    rows = sorted(tokenized(job.held_out, job.spec, base), key=lambda row: row.length)
    parts = [rows[start : start + _EVALUATED_ROWS] for start in range(0, len(rows), _EVALUATED_ROWS)]
    weights = [sum(row.loss_weight for row in part) for part in parts]
    if isinstance(job.spec.task, CausalLmTask):
        losses = [batch_loss(model, part) for part in parts]
        predictions = []
    else:
        outputs = [sequence_output(model, part) for part in parts]
        losses = [output.loss for output in outputs]
        logits = torch.cat([output.logits for output in outputs])
        classes = isinstance(job.spec.task, ClassificationTask)
        predictions = (logits.argmax(dim=1) if classes else logits.squeeze(1)).tolist()
    mean = sum(float(loss) * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
    labels = [row.label for row in rows if row.label is not None]
    return evaluate(job.spec.task, mean_loss=mean, labels=labels, predictions=predictions)
