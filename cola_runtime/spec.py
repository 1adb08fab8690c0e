"""What a tenant asks for: the one schema that YAML files, the SDK, the CLI and every server door share.

Unknown fields are refused with the nearest known name; every number has a range. Imports pydantic only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from cola_runtime.errors import InvalidInput, Violation

MAX_RANK = 256
MAX_STEPS = 1_000_000
MAX_ROWS_PER_STEP = 4096

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
ModulePattern = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,200}$")]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraSpec(_Spec):
    """A LoRA adapter, in PEFT's words."""

    kind: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1, le=MAX_RANK, strict=True)] = 8
    alpha: Annotated[float, Field(gt=0, le=65536)] = 16.0
    use_rslora: bool = False
    target_modules: Literal["all-linear", "attention", "mlp"] | tuple[ModulePattern, ...] = "all-linear"
    """A preset, or module names as PEFT matches them: a full name, or its last parts (`q_proj`)."""


class OptimizerSpec(_Spec):
    """Hyper-parameters in `torch.optim`'s words."""

    kind: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 2e-4
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    nesterov: bool = False
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimizerSpec:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class ScheduleSpec(_Spec):
    """Learning rate over the job's steps."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0, le=MAX_STEPS, strict=True)] = 0


class JobSpec(_Spec):
    """One adaptation job: which base model, which adapter, which data, how long."""

    name: Name
    base_model: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    adapter: LoraSpec = LoraSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS, strict=True)] | None = None
    """Optimizer steps. Exactly one of `steps` and `passes` is given; neither means one pass."""
    passes: Annotated[int, Field(ge=1, le=1000, strict=True)] | None = None
    """Passes over the data; the last step of a pass may be smaller."""
    rows_per_step: Annotated[int, Field(ge=1, le=MAX_ROWS_PER_STEP, strict=True)] = 8
    adaptation_interval: Annotated[int, Field(ge=1, le=1024, strict=True)] = 1
    """Microbatches that the rows of a step are split into."""
    max_length: Annotated[int, Field(ge=2, le=1_048_576, strict=True)] | None = None
    """Longest row in tokens; None is the base model's context."""
    truncate: bool = False
    """Cut longer rows at `max_length` instead of refusing the dataset."""
    loss: Literal["completion", "full"] = "completion"
    """Which tokens are labels: the completion (or assistant turns) only, or all."""
    shuffle: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    encoding: Literal["auto", "activations", "adapter_gradient"] = "auto"
    checkpoint_every: Annotated[int, Field(ge=1, le=MAX_STEPS, strict=True)] = 10
    """Steps between two checkpoints; the last step always makes one."""

    @model_validator(mode="after")
    def _one_length(self) -> JobSpec:
        if self.steps is not None and self.passes is not None:
            raise ValueError("give steps or passes, not both")
        if self.adaptation_interval > self.rows_per_step:
            raise ValueError("adaptation_interval is more than rows_per_step: a microbatch needs a row")
        return self


def parse_job_spec(fields: dict[str, Any], *, source: str = "job") -> JobSpec:
    """Check outside input. Raises InvalidInput with one violation per wrong field, at `source.field`."""
    try:
        return JobSpec.model_validate(fields)
    except ValidationError as error:
        violations = tuple(_violations(error, source))
        reason = "UNKNOWN_FIELD" if any("unknown field" in v.message for v in violations) else "SPEC_INVALID"
        text = "; ".join(f"{v.where}: {v.message}" for v in violations)
        raise InvalidInput(
            reason,
            text,
            remedy="Correct the field and submit again; nothing was created.",
            violations=violations,
        ) from error


def _violations(error: ValidationError, source: str) -> Iterator[Violation]:
    for item in error.errors(include_url=False):
        path = [str(part) for part in item["loc"] if "[" not in str(part)]
        where = ".".join([source, *path])
        if item["type"] == "extra_forbidden":
            yield Violation(where=where, message=_unknown_field(path))
        else:
            yield Violation(where=where, message=f"{item['msg']}, got {item['input']!r}"[:300])


def _unknown_field(path: list[str]) -> str:
    model: Any = JobSpec
    for part in path[:-1]:
        model = model.model_fields[part].annotation
    near = difflib.get_close_matches(path[-1], model.model_fields, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(model.model_fields)}"
    return f"unknown field {path[-1]!r}; {hint}"
