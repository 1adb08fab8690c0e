"""Computes cells: the runtime's gradients and trajectories against a stock model with ordinary modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from cola_runtime.adapter_spec import AdapterPart, AdapterSpec, HeadKind, head_part
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.adapters.checkpoint_format import TrainingDefinition
from cola_runtime.adapters.site_kinds import unfit
from cola_runtime.base_model.model import TappedModel
from cola_runtime.device.session import AdapterSession
from cola_runtime.encodings import Encoding
from cola_runtime.job_choices import Task
from cola_runtime.rows import Row
from cola_runtime.testing.architectures import (
    WITHOUT_ATTENTION,
    save_causal_model,
    save_encoder_decoder,
    save_image_classifier,
)
from cola_runtime.testing.ordinary_modules import add_adapter, wide_norms
from cola_runtime.testing.peft_reference import batch_loss, relative_difference
from cola_runtime.testing.sequence_reference import sequence_model, sequence_output
from cola_runtime.testing.tiny_models import save_tiny_model
from cola_runtime.types import (
    Gang,
    LearningRateSchedule,
    Membership,
    OptimizerHyperparameters,
    Segment,
    Site,
    TensorKey,
)
from tests.base_model.image_samples import image_row
from tests.base_model.kind_samples import KINDS, ZERO, random_weights
from tests.base_model.mixed_samples import Tenant, Weights, gradients_of, random_row, run_segments
from tests.base_model.test_encoder_decoders import row_loss
from tests.matrix.cells import Cell, cells

ADAMW = OptimizerHyperparameters(kind="adamw", learning_rate=2e-3, eps=1e-6, weight_decay=0.01)
CONSTANT = LearningRateSchedule(kind="constant", warmup_steps=0, total_steps=1000)
LENGTHS = [(17, 9), (29,), (5, 21), (12,)]


@dataclass(frozen=True, slots=True)
class Setting:
    """One base model and what it is trained for."""

    architecture: str
    task: Task
    dtype: str
    folder: Path


@cache
def tapped_model(setting: Setting) -> TappedModel:
    # Eager attention goes through float32 in many architectures, whatever the model's type; T5 has no other.
    only_one = setting.task is Task.SEQUENCE_TO_SEQUENCE or setting.architecture in WITHOUT_ATTENTION
    attention = "auto" if only_one else "sdpa"
    return TappedModel.load(_saved(setting), dtype=setting.dtype, attention=attention)


def gradient_errors(setting: Setting, mode: str, encoding: Encoding) -> dict[Cell, float]:
    """Relative difference from autograd of every cell that is not empty: see `_difference`."""
    model = tapped_model(setting)
    wanted = cells(setting.architecture, setting.task, mode, encoding)
    members = {cell: member(setting, cell.kind) for cell, empty in wanted.items() if empty is None}
    found: dict[Cell, Weights] = {}
    for together in _batches(list(members), mode):
        tenants = [members[cell] for cell in together]
        for tenant in tenants:
            _install(model, tenant, tenant.weights, 0, mode)
        result, taps = run_segments(model, [_segment(tenant, encoding, mode) for tenant in tenants])
        assert [loss.reason for loss in result.losses] == [None] * len(tenants)
        for position, cell in enumerate(together):
            found[cell] = gradients_of(taps, position, members[cell])
        for tenant in tenants:
            model.evict(tenant.job_id)
    return {
        cell: _difference(found[cell], reference_gradients(setting, cell.kind), setting.dtype)
        for cell in found
    }


def trajectory_errors(setting: Setting, mode: str, encoding: Encoding, *, steps: int) -> dict[Cell, float]:
    """Largest relative difference of a weight after `steps` of AdamW through device sessions."""
    model = tapped_model(setting)
    wanted = cells(setting.architecture, setting.task, mode, encoding)
    members = {cell: member(setting, cell.kind) for cell, empty in wanted.items() if empty is None}
    sessions = {
        cell: AdapterSession.create(TrainingDefinition(spec=each.spec, optimizer=ADAMW, schedule=CONSTANT))
        for cell, each in members.items()
    }
    for together in _batches(list(members), mode):
        for version in range(steps):
            for cell in together:
                _install(model, members[cell], sessions[cell].weights(), version, mode)
            segments = [
                replace(_segment(_at_step(members[cell], version), encoding, mode), version=version)
                for cell in together
            ]
            _, taps = run_segments(model, segments)
            for tap in taps:
                for key, tensor in tap.tensors.items():
                    sessions[together[tap.segment]].add(key, tensor, version=version)
            for cell in together:
                sessions[cell].apply(version=version)
        for cell in together:
            model.evict(members[cell].job_id)
    return {
        cell: max(
            relative_difference(
                sessions[cell].weights(), reference_weights(setting, cell.kind, steps)
            ).values()
        )
        for cell in members
    }


@cache
def member(setting: Setting, kind: str) -> Tenant:
    """A tenant of the kind at every site; biases leave a BERT's keys out, where their gradient is zero."""
    number = list(KINDS).index(kind)
    model = tapped_model(setting)
    parts = [AdapterPart(kind=KINDS[kind], sites=tuple(s for s in model.catalogue if _fits(s, kind, model)))]
    if setting.task in (Task.SEQUENCE_CLASSIFICATION, Task.REGRESSION, Task.IMAGE_CLASSIFICATION):
        regression = setting.task is Task.REGRESSION
        head = HeadKind(
            labels=1 if regression else 2 + number, problem="regression" if regression else "classification"
        )
        parts.append(head_part(head, model.catalogue, hidden_size=model.describe("", "").hidden_size))
    spec = AdapterSpec(parts=tuple(parts), seed=number, dtype=setting.dtype)
    rows = tuple(
        image_row(model, seed=100 * number + place, labels=2 + number)
        if setting.task is Task.IMAGE_CLASSIFICATION
        else _row(setting.task, length, seed=100 * number + place, labels=2 + number)
        for place, length in enumerate(LENGTHS[number % 4])
    )
    return Tenant(job_id=f"job-{kind}", spec=spec, weights=random_weights(spec), rows=rows)


@cache
def reference_gradients(setting: Setting, kind: str) -> Weights:
    each = member(setting, kind)
    model, parameters = _stock(setting, each.spec, each.weights)
    _loss(setting.task, model, each.rows).backward()
    return {key.gradient: torch.zeros_like(p) if p.grad is None else p.grad for key, p in parameters.items()}


@cache
def reference_weights(setting: Setting, kind: str, steps: int) -> Weights:
    each = member(setting, kind)
    model, parameters = _stock(setting, each.spec, initial_weights(each.spec))
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=ADAMW.learning_rate, eps=ADAMW.eps, weight_decay=ADAMW.weight_decay
    )
    for step in range(steps):
        optimizer.zero_grad()
        _loss(setting.task, model, _at_step(each, step).rows).backward()
        optimizer.step()
    return {key: parameter.detach() for key, parameter in parameters.items()}


def _difference(found: Weights, expected: Weights, dtype: str) -> float:
    """In float64 the worst tensor's, but for those whose gradient is zero up to rounding.

    In float32 that of the whole gradient, as one vector: a tensor whose terms cancel (a bias in front of a
    norm) has no more digits than that, in the stock model either.
    """
    norm = sum(float(gradient.double().norm()) ** 2 for gradient in expected.values()) ** 0.5
    if dtype == "float32":
        total = sum(float((found[key].double() - expected[key].double()).norm()) ** 2 for key in expected)
        return float(total**0.5 / norm)
    floor = ZERO * norm
    differences = relative_difference(found, expected)
    return max(d for key, d in differences.items() if float(expected[key].norm()) > floor)


def _batches(wanted: Sequence[Cell], mode: str) -> list[list[Cell]]:
    """All kinds in one mixed batch; merged, each is a gang of its own."""
    return [list(wanted)] if mode == "unmerged" else [[cell] for cell in wanted]


def _install(model: TappedModel, tenant: Tenant, weights: Weights, version: int, mode: str) -> None:
    membership = None if mode == "unmerged" else Membership(gang=_gang(tenant))
    model.install(tenant.lease, tenant.spec, version, weights, membership=membership)


def _gang(tenant: Tenant) -> Gang:
    return Gang(name=f"job/{tenant.job_id}", combine="sum")


def _segment(tenant: Tenant, encoding: Encoding, mode: str) -> Segment:
    segment = replace(tenant.segment(encoding), loss_denominator=sum(row.loss_weight for row in tenant.rows))
    return segment if mode == "unmerged" else replace(segment, gang=_gang(tenant))


def _at_step(tenant: Tenant, step: int) -> Tenant:
    """Other tokens every step, in trajectories, which are of texts."""
    return replace(tenant, rows=tuple(replace(row, tokens=np.roll(row.tokens, step)) for row in tenant.rows))


def _fits(site: Site, kind: str, model: TappedModel) -> bool:
    tied = model.describe("", "").tied_sites  # may not be merged
    return unfit(KINDS[kind], site) is None and site.index not in tied and _has_gradient(site.name, kind)


def _has_gradient(site: str, kind: str) -> bool:
    has_bias = kind in ("linear-bias", "mlp-relu", "mlp-gelu")
    return not (has_bias and site.endswith((".key", ".k_proj", "SelfAttention.k", "EncDecAttention.k")))


def _row(task: Task, length: int, *, seed: int, labels: int) -> Row:
    random = np.random.default_rng(seed)
    if task is Task.CAUSAL_LM:
        return random_row(length, seed=seed)
    if task is Task.SEQUENCE_TO_SEQUENCE:
        source = random.integers(5, 250, 3 + (7 * length) % 19, dtype=np.int32)
        return replace(random_row(length, seed=seed), source=source)
    label = float(random.normal()) if task is Task.REGRESSION else int(random.integers(0, labels))
    tokens = random.integers(5, 250, length, dtype=np.int32)
    return Row(tokens=tokens, weights=np.empty(0, np.float32), label=label)


def _saved(setting: Setting) -> Path:
    folder = setting.folder / f"{setting.architecture}-{setting.task}-{setting.dtype}"
    if folder.exists():
        return folder
    if setting.task is Task.CAUSAL_LM:
        return save_causal_model(setting.architecture, folder, dtype=setting.dtype)
    if setting.task is Task.SEQUENCE_TO_SEQUENCE:
        return save_encoder_decoder(setting.architecture, folder, dtype=setting.dtype)
    if setting.task is Task.IMAGE_CLASSIFICATION:
        return save_image_classifier(setting.architecture, folder, dtype=setting.dtype)
    return save_tiny_model(setting.architecture, folder, dtype=setting.dtype)  # type: ignore[arg-type]


def _stock(setting: Setting, spec: AdapterSpec, weights: Weights) -> tuple[Any, dict[TensorKey, Tensor]]:
    """transformers' own model with the adapter as ordinary modules, and what trains."""
    path, details = _saved(setting), tapped_model(setting).describe("", "").details
    by_hand = details["body"] == "LlamaBody"
    attention = "sdpa" if by_hand else details["attention"]
    if spec.head is not None:
        return sequence_model(path, spec, weights, dtype=setting.dtype, attention=attention)
    auto = AutoModelForCausalLM if setting.task is Task.CAUSAL_LM else AutoModelForSeq2SeqLM
    model = auto.from_pretrained(path, dtype=getattr(torch, setting.dtype), attn_implementation=attention)
    if by_hand:
        wide_norms(model)
    return model, add_adapter(model.requires_grad_(False).eval(), spec, weights)


def _loss(task: Task, model: Any, rows: Sequence[Row]) -> Tensor:
    if task is Task.CAUSAL_LM:
        return batch_loss(model, rows)
    if task is Task.SEQUENCE_TO_SEQUENCE:
        total: Any = sum(row_loss(model, row) for row in rows)
        return total / float(sum(row.weights.sum(dtype=np.float64) for row in rows))
    loss: Tensor = sequence_output(model, rows).loss
    return loss
