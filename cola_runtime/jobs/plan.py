"""From a job's spec to what devices and base model are told. Pure; torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cola_runtime.adapter_spec import AdapterPart, AdapterSpec, head_part
from cola_runtime.adapters.mergeable import check_mergeable
from cola_runtime.adapters.targets import resolve_target_sites
from cola_runtime.errors import InvalidInput
from cola_runtime.spec import CollaborationSpec, JobSpec
from cola_runtime.types import (
    BaseModelDescription,
    Gang,
    LearningRateSchedule,
    Membership,
    OptimizerHyperparameters,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """Everything about an adapter's training that does not change from step to step."""

    adapter: AdapterSpec
    optimizer: OptimizerHyperparameters
    schedule: LearningRateSchedule
    checkpoint_every: int
    merged: bool = False
    collaboration: CollaborationSpec | None = None

    def membership(self, job_id: str) -> Membership | None:
        """The gang that the job's adapter is merged with; None if it is computed beside the base."""
        if not self.merged:
            return None
        if self.collaboration is None:
            return Membership(gang=Gang(name=f"job/{job_id}", combine="sum"))
        gang = Gang(name=f"group/{self.collaboration.group}", combine=self.collaboration.combine)
        return Membership(gang=gang, weight=self.collaboration.weight)


def training_plan(spec: JobSpec, base: BaseModelDescription, *, total_steps: int) -> TrainingPlan:
    """Raises InvalidInput: `NO_MODULE_MATCHED` when target modules name no site of the base model,
    `SITE_TWICE` when two parts of the adapter name the same one, `TASK_UNSUPPORTED` when the base model does
    not serve the job's task, and those of `check_mergeable`.
    """
    _check_task(spec, base)
    adapter = AdapterSpec(
        parts=tuple(_parts(spec, base)),
        seed=spec.seed,
        dtype="float64" if base.dtype == "float64" else "float32",
    )
    if spec.mode == "merged":
        check_mergeable(adapter, dtype=base.dtype, tied_sites=base.tied_sites)
    optimizer = OptimizerHyperparameters(**spec.optimizer.model_dump())
    schedule = LearningRateSchedule(
        kind=spec.schedule.kind, warmup_steps=spec.schedule.warmup_steps, total_steps=total_steps
    )
    return TrainingPlan(
        adapter=adapter,
        optimizer=optimizer,
        schedule=schedule,
        checkpoint_every=spec.checkpoint_every,
        merged=spec.mode == "merged",
        collaboration=spec.collaboration,
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
    if spec.task.head is not None:
        yield head_part(spec.task.head, base.sites, hidden_size=base.hidden_size)


def _check_task(spec: JobSpec, base: BaseModelDescription) -> None:
    if spec.task.kind not in base.tasks:
        raise InvalidInput(
            "TASK_UNSUPPORTED",
            f"base model {base.name} ({base.architecture}) is not trained for {spec.task.kind}",
            where="job.task",
            limit=", ".join(base.tasks),
            actual=spec.task.kind,
            remedy="Name one of its tasks, or another base model; nothing was created.",
        )
