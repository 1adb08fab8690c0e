"""What the SDK returns: frozen values with the wire messages' fields. Times are RFC 3339 in UTC."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import Message

from cola_runtime.proto import jobs_pb2
from cola_runtime.spec import JobSpec

ENDED_STATES = frozenset({"succeeded", "failed", "cancelled"})

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job as it stood when the service answered."""

    job_id: str
    name: str
    state: str  # queued, running, paused, succeeded, failed or cancelled
    base_model: str
    version: int  # optimizer steps applied
    total_steps: int
    device_id: str  # "" while no device trains it
    waiting_reason: str  # why it is not in a base step now; "" if it is
    created_at: str
    finished_at: str  # "" until it has ended
    failure_reason: str  # stable code; "" unless failed
    failure_message: str
    evaluation_loss_before: float | None  # held-out loss at step 0
    evaluation_loss_after: float | None  # held-out loss of the newest evaluation behind step 0
    last_loss: float | None
    tokens: int
    label_tokens: int
    bytes_up: int  # base model -> device
    bytes_down: int  # device -> base model
    spec_json: str
    tenant: str
    encoding: str
    base_seconds: float
    device_seconds: float
    evaluation_tokens: int
    repeated_steps: int  # made again since a device or the service was lost
    deadline_at: str  # "" without one
    deadline_missed_at: str  # "" unless it passed before the end
    replica: str  # of its base model, that computes its rows; "" while none does
    stale: bool  # what the coordinator last knew: the job store cannot be read now

    @property
    def ended(self) -> bool:
        return self.state in ENDED_STATES

    @property
    def spec(self) -> JobSpec:
        return JobSpec.model_validate_json(self.spec_json)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What all jobs of a tenant have used, of what is recorded with their steps and evaluations.

    Steps and tokens as the records stand; bytes and seconds also of repeated steps.
    """

    tenant: str
    jobs: int
    steps: int
    repeated_steps: int
    tokens: int  # trained on
    label_tokens: int
    evaluation_tokens: int
    base_seconds: float  # of the base model: a base step's seconds are shared by tokens
    device_seconds: float
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of a job's history."""

    id: int  # grows; `events(after=id)` goes on behind it
    job_id: str
    created_at: str
    kind: str  # stable key, as "step.applied"
    level: str
    message: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One applied optimizer step."""

    step: int
    loss: float  # mean over the step's label tokens, before the step
    learning_rate: float
    gradient_norm: float
    tokens: int
    label_tokens: int
    bytes_up: int
    bytes_down: int
    base_seconds: float
    device_seconds: float
    device_id: str
    epoch: int
    applied_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What the held-out rows gave at one version."""

    step: int  # 0 is before the first step
    metrics: Mapping[str, float]  # "loss" always; others by the job's task
    primary: str  # the metric that the job compares by
    greater_is_better: bool  # of the primary metric
    best: bool  # so far, by the job's min_delta
    created_at: str

    @property
    def value(self) -> float:
        """The primary metric's."""
        return self.metrics[self.primary]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    version: int
    bytes: int
    sha256: str
    created_at: str
    best: bool  # of the best evaluation's version
    pinned: bool  # kept for good


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetReport:
    """What a dataset amounts to for one job; lengths are in tokens."""

    rows: int
    tokens: int
    label_tokens: int
    longest: int
    median: int
    truncated: int
    steps: int
    format: str
    literal_markup_rows: int  # whose text spells a special token; it is encoded as text


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEstimate:
    """What a job would take; `assumptions` says under which conditions."""

    steps: int
    tokens: int  # trained on
    label_tokens: int
    evaluation_tokens: int
    encoding: str
    bytes_up: int  # base model -> device
    bytes_down: int  # device -> base model
    bank_bytes: int  # beside the base model, while it trains
    base_seconds: float
    seconds: float  # from now to its end, as long as those stay who are there now
    share: float  # of the base model, likewise
    meets_deadline: bool | None  # None: the job has none
    assumptions: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    text: str
    prompt_tokens: int
    completion_tokens: int
    adapter_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One process that computes a base model's base steps; what it did counts from the service's start."""

    replica: str
    state: str  # "ready" or "lost"
    jobs: int
    base_busy_seconds: float
    base_steps: int
    tokens: int
    bank_hits: int  # adapters of base steps whose weights were on its device; all 0 without a byte limit
    bank_misses: int
    bank_evicted_bytes: int
    bank_resident_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    name: str
    architecture: str
    context_length: int
    dtype: str
    parameters: int
    sites: tuple[str, ...]
    details: Mapping[str, str]
    replicas: tuple[Replica, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    device_id: str
    state: str
    jobs: int
    busy_seconds: float
    trust_class: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The service as the caller's key sees it."""

    version: str
    tenant: str
    base_models: tuple[BaseModel, ...]
    devices: tuple[Device, ...]
    base_busy_seconds: float
    uptime_seconds: float
    base_steps: int
    degraded: str  # why answers may be stale and writes are refused; "": all is well
    quarantined_devices: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What is known of an API key; the key itself was shown once."""

    key_id: str
    tenant: str
    scopes: tuple[str, ...]
    created_at: str
    last_used_at: str
    revoked_at: str
    expires_at: str  # "": it does not end by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    key: str  # the secret; it cannot be shown again
    tenant: str
    scopes: tuple[str, ...]
    weight: float  # of the tenant's fair share
    tokens_per_minute: int | None  # its caps; None: none
    concurrent_jobs: int | None
    total_steps: int | None
    pinned_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinToken:
    token: str  # the secret; it cannot be shown again
    token_id: str
    trust_class: str
    reusable: bool  # otherwise it makes one device
    expires_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredDevice:
    """A device that holds a certificate of the service, or is in quarantine."""

    device_id: str
    trust_class: str
    joined_at: str  # "": it has no certificate, as where there is no TLS
    expires_at: str  # of its certificate
    revoked_at: str  # "": valid
    quarantined_at: str  # "": it is not
    quarantine_reason: str
    quarantine_message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One thing that was done or refused."""

    id: int
    created_at: str
    kind: str  # stable key, as "key.created"
    actor: str  # a key's or device's id, an address, or "operator" at the data folder
    tenant: str
    subject: str  # the id of what it was done to
    message: str


def value_from(kind: type[Value], message: Message) -> Value:
    """`kind` with the fields of the same names of `message`; an optional field that is absent is None."""
    fields = {field.name: _field(message, field.name) for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**fields)


def event_from(message: jobs_pb2.Event) -> Event:
    data = json.loads(message.data_json or "{}")
    return Event(
        id=message.id,
        job_id=message.job_id,
        created_at=message.created_at,
        kind=message.kind,
        level=message.level,
        message=message.message,
        data=data,
    )


def service_from(message: jobs_pb2.ServiceDescription) -> Service:
    return Service(
        version=message.version,
        tenant=message.tenant,
        base_models=tuple(map(_base_model_from, message.base_models)),
        devices=tuple(value_from(Device, device) for device in message.devices),
        base_busy_seconds=message.base_busy_seconds,
        uptime_seconds=message.uptime_seconds,
        base_steps=message.base_steps,
        degraded=message.degraded,
        quarantined_devices=tuple(message.quarantined_devices),
    )


def _base_model_from(message: jobs_pb2.BaseModelInfo) -> BaseModel:
    replicas = tuple(value_from(Replica, replica) for replica in message.replicas)
    return dataclasses.replace(value_from(BaseModel, message), replicas=replicas)


def _field(message: Message, name: str) -> Any:
    descriptor = message.DESCRIPTOR.fields_by_name[name]
    value = getattr(message, name)
    if descriptor.is_repeated:
        return dict(value) if isinstance(value, Mapping) else tuple(value)
    optional = descriptor.containing_oneof is not None
    return None if optional and not message.HasField(name) else value
