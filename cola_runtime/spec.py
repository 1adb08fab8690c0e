"""What a tenant asks for: the one schema that YAML files, the SDK, the CLI and every server door share.

Unknown fields are refused (`spec_parsing.py` says how); every number has a range. Imports pydantic only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    TypeAdapter,
    model_validator,
)

from cola_runtime.adapter_spec import (
    AdapterKind,
    Frozen,
    LinearizedLoraKind,
    LinearKind,
    LoraKind,
    MlpKind,
    ModuleKind,
    Number,
)
from cola_runtime.job_choices import Metric, TrustClass
from cola_runtime.task_spec import (
    CausalLmTask,
    ImageClassificationTask,
    SequenceToSequenceTask,
    TaskSpec,
)

MAX_STEPS = 1_000_000
MAX_ROWS_PER_STEP = 4096
MAX_INNER_STEPS = 64
MAX_PARTS = 16
EVALUATION_TOKENS = 64
MAX_EVALUATION_TOKENS = 256
MAX_LOSS_SCALE = 2.0**24
MAX_SHARDS = 8
MAX_DEADLINE_SECONDS = 366 * 86_400.0

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
ModulePattern = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,200}$")]


def _power_of_two(value: float) -> float:
    if math.frexp(value)[0] != 0.5:
        raise ValueError("not a power of two, which alone can be divided by again exactly")
    return value


PowerOfTwo = Annotated[Number, Field(ge=1, le=MAX_LOSS_SCALE), AfterValidator(_power_of_two)]


class _Targeted(Frozen):
    """Which sites an adapter kind is attached to."""

    target_modules: Literal["all-linear", "attention", "mlp"] | tuple[ModulePattern, ...] = "all-linear"
    """A preset, or module names as PEFT matches them: a full name, or its last parts (`q_proj`)."""

    @property
    def adapter_kind(self) -> AdapterKind:
        return _KIND.validate_python(self.model_dump(exclude={"target_modules"}))


class LoraSpec(LoraKind, _Targeted):
    """A LoRA adapter."""


class LinearSpec(LinearKind, _Targeted):
    """A full-rank adapter."""


class MlpSpec(MlpKind, _Targeted):
    """An MLP adapter."""


class LinearizedLoraSpec(LinearizedLoraKind, _Targeted):
    """A linearized LoRA adapter."""


class ModuleSpec(ModuleKind, _Targeted):
    """A registered module as adapter."""


PartSpec = LoraSpec | LinearSpec | MlpSpec | LinearizedLoraSpec | ModuleSpec
PARTS_TAG = "parts"


def _tag(value: Any) -> str:
    """`lora` is what an adapter is unless it says otherwise; a list is an adapter of several kinds."""
    if isinstance(value, list | tuple):
        return PARTS_TAG
    kind = value.get("kind", "lora") if isinstance(value, Mapping) else getattr(value, "kind", "")
    return str(kind)


_TaggedPart = (
    Annotated[LoraSpec, Tag("lora")]
    | Annotated[LinearSpec, Tag("linear")]
    | Annotated[MlpSpec, Tag("mlp")]
    | Annotated[LinearizedLoraSpec, Tag("linearized_lora")]
    | Annotated[ModuleSpec, Tag("module")]
)
_Parts = Annotated[tuple[Annotated[_TaggedPart, Discriminator(_tag)], ...], Field(max_length=MAX_PARTS)]
_KIND: TypeAdapter[AdapterKind] = TypeAdapter(Annotated[AdapterKind, Field(discriminator="kind")])
PART_MODELS: dict[str, type[BaseModel]] = {
    "lora": LoraSpec,
    "linear": LinearSpec,
    "mlp": MlpSpec,
    "linearized_lora": LinearizedLoraSpec,
    "module": ModuleSpec,
}


_OWN_FIELDS = {
    "adamw": ("betas", "eps"),
    "sgd": ("momentum", "nesterov"),
    "adafactor": ("beta2_decay", "eps1", "eps2", "d"),
}
"""What each optimizer has beside learning_rate, weight_decay and max_grad_norm."""


class OptimizerSpec(Frozen):
    """Hyper-parameters in `torch.optim`'s words (docs/training_options.md).

    One that the kind does not have is refused unless it is left at its default.
    """

    kind: Literal["adamw", "sgd", "adafactor"] = "adamw"
    learning_rate: Annotated[Number, Field(gt=0, le=100)] = 2e-4
    betas: tuple[Annotated[Number, Field(ge=0, lt=1)], Annotated[Number, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[Number, Field(gt=0, le=1)] = 1e-8
    weight_decay: Annotated[Number, Field(ge=0, le=10)] = 0.0
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    nesterov: bool = False
    max_grad_norm: Annotated[Number, Field(gt=0)] | None = None
    beta2_decay: Annotated[Number, Field(ge=-10, le=0)] = -0.8
    """Adafactor: the running mean takes in step t's squares with weight t^beta2_decay."""
    eps1: Annotated[Number, Field(ge=0, le=1)] | None = None
    """Adafactor: least root of a squared gradient's estimate; None is the machine epsilon of the dtype."""
    eps2: Annotated[Number, Field(ge=0, le=1)] = 1e-3
    """Adafactor: least root mean square of a weight that a step is taken relative to."""
    d: Annotated[Number, Field(ge=1, le=1e6)] = 1.0
    """Adafactor: most root mean square of a weight's update."""

    @model_validator(mode="after")
    def _only_its_own_fields(self) -> OptimizerSpec:
        own = _OWN_FIELDS[self.kind]
        for name in (name for names in _OWN_FIELDS.values() for name in names if name not in own):
            if getattr(self, name) != OptimizerSpec.model_fields[name].default:
                raise ValueError(f"{self.kind} has no {name}; of its own it has {', '.join(own)}")
        return self

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimizerSpec:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class ScheduleSpec(Frozen):
    """Learning rate over the job's steps."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0, le=MAX_STEPS, strict=True)] = 0


class CollaborationSpec(Frozen):
    """Merge this job's adapter with those of all jobs that name the same group (docs/modes.md).

    Whoever knows the name can join, so it is as long as a secret. The same name with another `combine` is
    another group.
    """

    group: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{16,128}$")]
    weight: Annotated[Number, Field(gt=0, le=1e6)] = 1.0
    combine: Literal["mean", "sum"] = "mean"
    """p_k is weight_k over the sum of the present members' weights, or weight_k itself."""


class WatchdogSpec(Frozen):
    """What is done about a loss that is not finite, or explodes (docs/training_options.md)."""

    action: Literal["fail", "pause"] = "fail"
    """`pause` keeps the job: its tenant may resume it from its last checkpoint."""
    loss_factor: Annotated[Number, Field(gt=1, le=1e9)] | None = 10.0
    """A loss above this many times the highest of the first ten steps has exploded; None: no loss has."""
    patience: Annotated[int, Field(ge=1, le=1000, strict=True)] = 3
    """Exploded losses in a row after which the watchdog acts."""


class EvaluationSpec(Frozen):
    """When the held-out rows are evaluated, beside before the first and after the last step; what follows."""

    every: Annotated[int, Field(ge=1, le=MAX_STEPS, strict=True)] | None = None
    """Steps between two evaluations."""
    metric: Metric = Metric.LOSS
    """By which evaluations are compared. `rouge_l` generates from every held-out prompt (docs/tasks.md)."""
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_EVALUATION_TOKENS, strict=True)] | None = None
    """Of each generated answer; with `rouge_l` only, where leaving it out means 64."""
    patience: Annotated[int, Field(ge=1, le=MAX_STEPS, strict=True)] | None = None
    """Evaluations in a row without improvement after which the job ends early, as succeeded."""
    min_delta: Annotated[Number, Field(ge=0, le=1e9)] = 0.0
    """An improvement is better than the best one so far by more than this, in the metric's unit."""
    keep_best: bool = True
    """Make a checkpoint at every improvement, so that the best version can be exported."""

    @model_validator(mode="after")
    def _new_tokens_of_a_generating_metric(self) -> EvaluationSpec:
        if self.max_new_tokens is not None and not self.metric.generates:
            raise ValueError(f"max_new_tokens goes with metric rouge_l; {self.metric} generates nothing")
        return self

    @property
    def new_tokens(self) -> int:
        """At most, of each generated answer; 0 where the metric generates nothing."""
        return (self.max_new_tokens or EVALUATION_TOKENS) if self.metric.generates else 0


class DeadlineSpec(Frozen):
    """When the job should have ended. Its tenant's share goes to it first while that is in danger."""

    seconds: Annotated[Number, Field(gt=0, le=MAX_DEADLINE_SECONDS)]
    """From its submission."""
    when_missed: Literal["continue", "cancel"] = "continue"
    """A missed deadline is an event in any case; `cancel` also ends the job, and its checkpoints stay."""


class JobSpec(Frozen):
    """One adaptation job: which base model, which adapter, which data, how long."""

    name: Name
    base_model: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    adapter: Annotated[_TaggedPart | Annotated[_Parts, Tag(PARTS_TAG)], Discriminator(_tag)] = LoraSpec()
    """One kind at its target modules, or a list of them: no site may be in two. `[]` trains a head alone."""
    task: TaskSpec = CausalLmTask()
    """Without one a job trains a causal language model; the others train a head of their own as well."""
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS, strict=True)] | None = None
    """Optimizer steps. Exactly one of `steps` and `passes` is given; neither means one pass."""
    passes: Annotated[int, Field(ge=1, le=1000, strict=True)] | None = None
    """Passes over the data; the last step of a pass may be smaller."""
    rows_per_step: Annotated[int, Field(ge=1, le=MAX_ROWS_PER_STEP, strict=True)] = 8
    adaptation_interval: Annotated[int, Field(ge=1, le=1024, strict=True)] = 1
    """Microbatches that the rows of a step are split into."""
    inner_steps: Annotated[int, Field(ge=1, le=MAX_INNER_STEPS, strict=True)] = 1
    """Optimizer steps on the taps of one step. Above 1 training is not exact: docs/training_options.md."""
    max_length: Annotated[int, Field(ge=2, le=1_048_576, strict=True)] | None = None
    """Longest row in tokens, of an encoder-decoder each of source and target; None is the model's context."""
    truncate: bool = False
    """Cut longer rows at `max_length` instead of refusing the dataset."""
    loss: Literal["completion", "full"] = "completion"
    """Which tokens are labels: the completion (or assistant turns) only, or all."""
    shuffle: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    encoding: Literal["auto", "activations", "weight_gradient", "adapter_gradient"] = "auto"
    """How taps travel; `auto` takes the cheapest for each input (docs/encodings.md). All are exact."""
    compression: Literal["none", "bfloat16", "int8", "low_rank"] = "none"
    """Lossy: fewer bytes for a measured error (docs/encodings.md). `low_rank` is for full-rank adapters."""
    checkpoint_every: Annotated[int, Field(ge=1, le=MAX_STEPS, strict=True)] = 10
    """Steps between two checkpoints; the last step always makes one."""
    evaluation: EvaluationSpec = EvaluationSpec()
    watchdog: WatchdogSpec = WatchdogSpec()
    max_staleness: Literal[0, 1] = 0
    """0: a step's gradient is taken at the weights that it changes. 1: it may be those of one step before, so
    that base model and device work on a job at the same time (docs/staleness.md)."""
    priority: Literal["low", "normal", "high"] = "normal"
    """Among the tenant's own jobs: one of higher priority goes strictly before (docs/scheduling.md)."""
    deadline: DeadlineSpec | None = None
    """Orders the tenant's own jobs, never other tenants' (docs/scheduling.md)."""
    shards: Annotated[int, Field(ge=1, le=MAX_SHARDS, strict=True)] = 1
    """Devices that the adapter's sites are divided among; training stays the same (docs/sharding.md)."""
    trust: Annotated[tuple[TrustClass, ...], Field(min_length=1, max_length=len(TrustClass))] = (
        TrustClass.TRUSTED,
    )
    """Classes of devices that may train it. A device sees gradients, and these reveal the data to whoever
    holds them (docs/security.md): `community` lets devices see them that are not the operator's."""
    loss_scaling: Literal["none", "dynamic"] | PowerOfTwo | None = None
    """What the loss is multiplied by in the backward pass, so that small gradients survive a float16 base
    (docs/base_precision.md). None is `dynamic` beside such a base, else `none`."""
    mode: Literal["unmerged", "merged"] = "unmerged"
    """Compute the adapter beside the base weights, or merge it into them."""
    collaboration: CollaborationSpec | None = None
    """Makes the mode merged."""

    @model_validator(mode="before")
    @classmethod
    def _collaboration_is_merged(cls, fields: Any) -> Any:
        if isinstance(fields, Mapping) and fields.get("collaboration") is not None:
            return {"mode": "merged", **fields}
        return fields

    @property
    def adapter_parts(self) -> tuple[PartSpec, ...]:
        return self.adapter if isinstance(self.adapter, tuple) else (self.adapter,)

    @model_validator(mode="after")
    def _one_length(self) -> JobSpec:
        if self.steps is not None and self.passes is not None:
            raise ValueError("give steps or passes, not both")
        if self.adaptation_interval > self.rows_per_step:
            raise ValueError("adaptation_interval is more than rows_per_step: a microbatch needs a row")
        return self

    @model_validator(mode="after")
    def _no_unmerged_collaboration(self) -> JobSpec:
        if self.collaboration is not None and self.mode != "merged":
            raise ValueError("a collaboration is always merged: leave mode out")
        return self

    @model_validator(mode="after")
    def _images_are_never_cut(self) -> JobSpec:
        if isinstance(self.task, ImageClassificationTask) and (self.max_length is not None or self.truncate):
            raise ValueError("image_classification has no max_length and no truncate: all images are alike")
        return self

    @model_validator(mode="after")
    def _sources_are_read_only(self) -> JobSpec:
        if self.loss == "full" and isinstance(self.task, SequenceToSequenceTask):
            raise ValueError("sequence_to_sequence has no loss full: its model writes the completion only")
        return self

    @model_validator(mode="after")
    def _something_to_train(self) -> JobSpec:
        if not self.adapter_parts and self.task.head is None:
            raise ValueError("an adapter without parts trains nothing, as this task has no head")
        return self
