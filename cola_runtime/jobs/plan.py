"""From a job's spec to what devices and base model are told. Pure; torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cola_runtime.adapter_spec import AdapterPart, AdapterSpec
from cola_runtime.adapters.targets import resolve_target_sites
from cola_runtime.errors import InvalidInput
from cola_runtime.spec import JobSpec
from cola_runtime.types import (
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
    max_staleness: int


def training_plan(spec: JobSpec, base: BaseModelDescription, *, total_steps: int) -> TrainingPlan:
    """Raises InvalidInput: `NO_MODULE_MATCHED` when target modules name no site of the base model,
    `SITE_TWICE` when two parts of the adapter name the same one.
    """
    adapter = AdapterSpec(
        parts=tuple(_parts(spec, base)),
        seed=spec.seed,
        dtype="float64" if base.dtype == "float64" else "float32",
    )
    optimizer = OptimizerHyperparameters(**spec.optimizer.model_dump())
    schedule = LearningRateSchedule(
        kind=spec.schedule.kind, warmup_steps=spec.schedule.warmup_steps, total_steps=total_steps
    )
    return TrainingPlan(
        adapter=adapter,
        optimizer=optimizer,
        schedule=schedule,
        checkpoint_every=spec.checkpoint_every,
        max_staleness=spec.max_staleness,
    )


def _parts(spec: JobSpec, base: BaseModelDescription) -> Iterator[AdapterPart]:
    taken: dict[int, int] = {}  # site -> the part that has it
    for number, part in enumerate(spec.adapter_parts):
        sites = resolve_target_sites(base.sites, part.target_modules)
        for site in sites:
            first = taken.setdefault(site.index, number)
            if first != number:
                raise InvalidInput(
                    "SITE_TWICE",
                    f"parts {first} and {number} of the adapter both name {site.name}",
                    where=f"job.adapter.{number}.target_modules",
                    remedy="Name each module in one part only; nothing was created.",
                )
        yield AdapterPart(kind=part.adapter_kind, sites=sites)
