"""What a run of the demo found out: plain values that the picture and the report are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PEFT_LOSS_TOLERANCE = 1e-4  # absolute, nats per label token, between peft and the runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPoint:
    """One optimizer step of one tenant."""

    step: int  # 1 is the first
    loss: float  # mean over the step's label tokens, nats
    gradient_norm: float  # before clipping
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantResult:
    """One tenant's job: what was asked for, how it went, and how it was checked. None: not measured."""

    name: str
    description: str
    rank: int
    encoding: str
    rows_per_step: int
    learning_rate: float
    steps: tuple[StepPoint, ...]
    training_rows: int
    held_out_rows: int
    loss_before: float  # held-out, nats per label token
    loss_after: float
    prompt: str
    generation_before: str
    generation_after: str
    bytes_up: int  # base model -> device
    bytes_down: int  # device -> base model
    tokens_per_second: float
    devices: tuple[str, ...]  # in the order in which they trained the adapter
    adapter_folder: str
    peft_loss: float | None = None  # held-out loss of the exported folder, by peft in a fresh process

    @property
    def peft_difference(self) -> float | None:
        """|peft's held-out loss - the runtime's|, in nats per label token."""
        return None if self.peft_loss is None else abs(self.peft_loss - self.loss_after)

    @property
    def learned(self) -> bool:
        return self.loss_after < self.loss_before

    @property
    def checks(self) -> tuple[bool, ...]:
        """Whether each check that was made passed: peft's held-out loss, if it was measured."""
        return () if self.peft_difference is None else (self.peft_difference <= PEFT_LOSS_TOLERANCE,)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceResult:
    """The run as a whole."""

    base_model: str
    base_busy: float  # share of the training time in which the base model computed, 0 to 1
    base_steps: int
    wall_seconds: float  # from the first submission to the end of the last job
    peak_memory_bytes: int  # all processes of the service together
    machine: str
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """Everything that report.html and loss_curves.png show."""

    started_at: str  # RFC 3339, UTC
    service: ServiceResult
    tenants: tuple[TenantResult, ...]


def smoothed(values: tuple[float, ...], *, window: int = 5) -> tuple[float, ...]:
    """Mean over the last `window` values up to each point; fewer at the start."""
    return tuple(
        sum(part := values[max(0, end - window) : end]) / len(part) for end in range(1, len(values) + 1)
    )
