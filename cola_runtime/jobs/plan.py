"""From a job's spec to what devices and base model are told. Pure; torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from pydantic import ValidationError

from cola_runtime.adapter_spec import AdapterPart, AdapterSpec, head_part
from cola_runtime.adapters.mergeable import check_mergeable
from cola_runtime.adapters.shards import check_shards, shard_specs
from cola_runtime.adapters.site_kinds import check_kind
from cola_runtime.adapters.targets import resolve_target_sites
from cola_runtime.config import PlannerSettings
from cola_runtime.encodings import ADAPTER_GRADIENTS, Compression, Encoding, TapPlan
from cola_runtime.errors import InvalidInput
from cola_runtime.gradients.planner import Costs, Workload, plan_taps
from cola_runtime.job_choices import Priority, TrustClass
from cola_runtime.jobs.records import JobRecord
from cola_runtime.rows import Row
from cola_runtime.spec import CollaborationSpec, JobSpec, WatchdogSpec
from cola_runtime.types import (
    PRODUCT_FLOPS,
    QUANTIZATION,
    UNQUANTIZED,
    UNSCALED,
    BaseModelDescription,
    Gang,
    LearningRateSchedule,
    LossScaling,
    Membership,
    OptimizerHyperparameters,
)

FIRST_LOSS_SCALE = 2.0**16  # torch.amp.GradScaler's


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """Everything about an adapter's training that does not change from step to step."""

    adapter: AdapterSpec
    optimizer: OptimizerHyperparameters
    schedule: LearningRateSchedule
    checkpoint_every: int
    max_staleness: int
    shards: int = 1
    taps: TapPlan = ADAPTER_GRADIENTS  # `job_taps` plans them for the job's data
    step_tokens: float = 0.0  # of a step, on the average; likewise of the job's data
    loss_scaling: LossScaling = UNSCALED
    merged: bool = False
    collaboration: CollaborationSpec | None = None
    priority: Priority = Priority.NORMAL
    watchdog: WatchdogSpec = field(default_factory=WatchdogSpec)
    trust: frozenset[TrustClass] = frozenset({TrustClass.TRUSTED})

    def of_shards(self) -> tuple[TrainingPlan, ...]:
        """What each shard's device is told."""
        return tuple(replace(self, adapter=spec) for spec in shard_specs(self.adapter, self.shards))

    def membership(self, job_id: str) -> Membership | None:
        """The gang that the job's adapter is merged with; None if it is computed beside the base."""
        if not self.merged:
            return None
        if self.collaboration is None:
            return Membership(gang=Gang(name=f"job/{job_id}", combine="sum"))
        gang = Gang(name=f"group/{self.collaboration.group}", combine=self.collaboration.combine)
        return Membership(gang=gang, weight=self.collaboration.weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSize:
    """What the encodings' planner needs to know of a job's training data."""

    rows: int
    tokens: int  # of an encoder-decoder its targets'
    source_tokens: int = 0

    @classmethod
    def of(cls, rows: Sequence[Row]) -> DataSize:
        of_sources = sum(row.source_length for row in rows)
        return cls(
            rows=len(rows), tokens=sum(row.length for row in rows) - of_sources, source_tokens=of_sources
        )


def job_taps(
    job: JobSpec, base: BaseModelDescription, adapter: AdapterSpec, data: DataSize, costs: Costs
) -> tuple[TapPlan, str]:
    """How the job's taps travel, and why: asked at admission and whenever the job is taken up, of the same.

    Raises InvalidInput `ENCODING_UNSUPPORTED`, `COMPRESSION_UNSUPPORTED`, `INNER_STEPS_NEED_ACTIVATIONS`.
    """
    workload = job_workload(job, base, data, costs)
    return plan_taps(
        adapter, workload, costs, requested=_requested(job), compression=Compression(job.compression)
    )


def job_workload(job: JobSpec, base: BaseModelDescription, data: DataSize, costs: Costs) -> Workload:
    """What an optimizer step of the job looks like, on the average."""
    rows = min(job.rows_per_step, data.rows)
    microbatches = min(job.adaptation_interval, rows)
    share = rows / data.rows / microbatches
    parts = math.ceil(share * (data.tokens + data.source_tokens) / costs.token_budget)
    return Workload(
        tokens=share * data.tokens / parts,
        rows=rows / microbatches / parts,
        microbatches=microbatches * parts,
        base_dtype=base.dtype,
        loss_scaled=_loss_scaling(job, base) != UNSCALED,
        source_tokens=share * data.source_tokens / parts,
        source_groups=frozenset(base.source_groups),
    )


def _requested(job: JobSpec) -> str:
    """More inner steps than one need each token's x and g on the device."""
    if job.inner_steps == 1:
        return job.encoding
    if job.encoding not in ("auto", Encoding.ACTIVATIONS):
        raise InvalidInput(
            "INNER_STEPS_NEED_ACTIVATIONS",
            f"{job.inner_steps} inner steps need each token's x and g on the device, not a {job.encoding}",
            where="job.encoding",
            remedy="Use encoding activations or auto, or inner_steps 1; nothing was created.",
        )
    return Encoding.ACTIVATIONS.value


def as_recorded(job: JobSpec, encoding: str) -> JobSpec:
    """The job asking for what its record says was planned, so that other speeds do not change it any more.

    The parts of a `mixed` plan are planned again. Any plan gives the same steps.
    """
    recorded = encoding.partition("+")[0]
    return job if recorded == "mixed" else job.model_copy(update={"encoding": recorded})


def wire_costs(settings: PlannerSettings, base: BaseModelDescription, *, token_budget: int) -> Costs:
    """The settings' speeds; the base model's own where they leave it open."""
    measured = float(base.details.get(PRODUCT_FLOPS, Costs().base_flops))
    return Costs(
        link_bytes_per_second=settings.link_bytes_per_second,
        base_flops=settings.accelerator_flops or measured,
        device_flops=settings.device_flops,
        token_budget=token_budget,
    )


def stored_spec(record: JobRecord) -> JobSpec:
    """Raises InvalidInput `STORED_SPEC_INVALID` for what another version accepted and this one does not."""
    try:
        return JobSpec.model_validate_json(record.spec_json)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InvalidInput(
            "STORED_SPEC_INVALID",
            f"another version of the service accepted the job's spec, and this one refuses it: {wrong}",
            where="job",
            remedy="Correct the spec and submit it again; the job's checkpoints are kept.",
        ) from error


def training_plan(spec: JobSpec, base: BaseModelDescription, *, total_steps: int) -> TrainingPlan:
    """Raises InvalidInput: `NO_MODULE_MATCHED` when target modules name no site of the base model,
    `SITE_TWICE` when two parts of the adapter name the same one, `SITE_UNSUPPORTED` when one is at a site
    that it cannot be at, `TASK_UNSUPPORTED` when the base model does not serve the job's task,
    `SHARDS_TOO_MANY`, `SHARDS_UNSUPPORTED`, and those of `check_mergeable`.
    """
    _check_task(spec, base)
    adapter = AdapterSpec(
        parts=tuple(_parts(spec, base)),
        seed=spec.seed,
        dtype="float64" if base.dtype == "float64" else "float32",
    )
    if spec.mode == "merged":
        check_mergeable(
            adapter,
            dtype=base.dtype,
            tied_sites=base.tied_sites,
            quantization=base.details.get(QUANTIZATION, UNQUANTIZED),
        )
    _check_shards(spec, adapter)
    optimizer = OptimizerHyperparameters(**spec.optimizer.model_dump(), inner_steps=spec.inner_steps)
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
        priority=Priority[spec.priority.upper()],
        max_staleness=spec.max_staleness,
        loss_scaling=_loss_scaling(spec, base),
        shards=spec.shards,
        watchdog=spec.watchdog,
        trust=frozenset(spec.trust),
    )


def _loss_scaling(spec: JobSpec, base: BaseModelDescription) -> LossScaling:
    asked = spec.loss_scaling
    if asked is None:
        asked = "dynamic" if base.dtype == "float16" else "none"
    if asked == "dynamic":
        return LossScaling(scale=FIRST_LOSS_SCALE, dynamic=True)
    return UNSCALED if asked == "none" else LossScaling(scale=asked)


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
        check_kind(part.adapter_kind, sites, where=f"job.adapter.{number}.target_modules")
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


def _check_shards(spec: JobSpec, adapter: AdapterSpec) -> None:
    if spec.shards > 1 and spec.inner_steps > 1:
        raise InvalidInput(
            "SHARDS_UNSUPPORTED",
            "each inner step is clipped by itself, and the devices of shards agree on one norm a step",
            where="job.inner_steps",
            limit=1,
            actual=spec.inner_steps,
            remedy="Use shards 1, or inner_steps 1; nothing was created.",
        )
    check_shards(adapter, spec.shards)
