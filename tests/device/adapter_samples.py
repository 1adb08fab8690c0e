"""A small adapter and deterministic gradients for it."""

from __future__ import annotations

import torch
from torch import Tensor

from cola_runtime.adapter_spec import AdapterPart, AdapterSpec, LinearKind, LoraKind, MlpKind, lora_spec
from cola_runtime.adapters.checkpoint_format import TrainingDefinition
from cola_runtime.adapters.shapes import weight_shapes
from cola_runtime.types import (
    LearningRateSchedule,
    OptimizerHyperparameters,
    Site,
    SiteKind,
    TensorKey,
)

SITES = (
    Site(
        index=0, name="layers.0.q_proj", kind=SiteKind.LINEAR, in_features=12, out_features=10, input_group=0
    ),
    Site(
        index=1, name="layers.0.k_proj", kind=SiteKind.LINEAR, in_features=12, out_features=6, input_group=0
    ),
    Site(index=4, name="layers.0.c_fc", kind=SiteKind.CONV1D, in_features=9, out_features=20, input_group=2),
)


def kinds_spec(dtype: str = "float32") -> AdapterSpec:
    """Matrices and vectors: a LoRA, a full-rank adapter with a bias and an MLP with two."""
    kinds = (LoraKind(rank=3, alpha=6.0), LinearKind(bias=True, scaling=0.5), MlpKind(hidden=4))
    parts = tuple(AdapterPart(kind=kind, sites=(site,)) for kind, site in zip(kinds, SITES, strict=True))
    return AdapterSpec(parts=parts, seed=5, dtype=dtype)


def definition(
    *,
    kind: str = "adamw",
    max_grad_norm: float | None = 1.0,
    dtype: str = "float32",
    rank: int = 3,
    total_steps: int = 8,
    sites: tuple[Site, ...] = SITES,
    spec: AdapterSpec | None = None,
    inner_steps: int = 1,
) -> TrainingDefinition:
    return TrainingDefinition(
        spec=spec or lora_spec(rank=rank, alpha=6.0, use_rslora=False, seed=5, sites=sites, dtype=dtype),
        optimizer=OptimizerHyperparameters(
            kind=kind,
            learning_rate=0.05,
            betas=(0.8, 0.95),
            weight_decay=0.1,
            momentum=0.9 if kind == "sgd" else 0.0,
            nesterov=kind == "sgd",
            max_grad_norm=max_grad_norm,
            beta2_decay=-0.7,
            eps1=1e-5,
            eps2=0.02,
            d=1.5,
            inner_steps=inner_steps,
        ),
        schedule=LearningRateSchedule(kind="cosine", warmup_steps=2, total_steps=total_steps),
    )


def gradients(training: TrainingDefinition, seed: int) -> dict[TensorKey, Tensor]:
    """One microbatch's adapter gradients."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, training.spec.dtype)
    return {
        key.gradient: torch.randn(shape, generator=generator, dtype=dtype)
        for key, shape in weight_shapes(training.spec).items()
    }
