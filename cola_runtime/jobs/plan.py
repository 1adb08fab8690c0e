"""From a job's spec to what devices and base model are told. Pure; torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from cola_runtime.adapters.targets import resolve_target_sites
from cola_runtime.spec import JobSpec
from cola_runtime.types import (
    AdapterSpec,
    BaseModelDescription,
    LearningRateSchedule,
    OptimizerHyperparameters,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """Everything about an adapter's training that does not change from step to step."""

    adapter: AdapterSpec
    optimizer: OptimizerHyperparameters
    schedule: LearningRateSchedule
    checkpoint_every: int


def training_plan(spec: JobSpec, base: BaseModelDescription, *, total_steps: int) -> TrainingPlan:
    """Raises InvalidInput `NO_MODULE_MATCHED` when the target modules name no site of the base model."""
    adapter = AdapterSpec(
        rank=spec.adapter.rank,
        alpha=spec.adapter.alpha,
        use_rslora=spec.adapter.use_rslora,
        seed=spec.seed,
        sites=resolve_target_sites(base.sites, spec.adapter.target_modules),
        dtype="float64" if base.dtype == "float64" else "float32",
    )
    optimizer = OptimizerHyperparameters(**spec.optimizer.model_dump())
    schedule = LearningRateSchedule(
        kind=spec.schedule.kind, warmup_steps=spec.schedule.warmup_steps, total_steps=total_steps
    )
    return TrainingPlan(
        adapter=adapter, optimizer=optimizer, schedule=schedule, checkpoint_every=spec.checkpoint_every
    )
