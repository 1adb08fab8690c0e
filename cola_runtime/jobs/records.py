"""What the job store takes and gives: frozen values, one per row. Times are RFC 3339 in UTC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cola_runtime.ids import new_job_id
from cola_runtime.jobs.state import TERMINAL_STATES, JobState


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One customer of the service; jobs, keys and data belong to exactly one."""

    tenant_id: str  # "tenant-" and 32 hex digits
    name: str  # unique, chosen by the operator
    created_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantTerms:
    """What a tenant is entitled to; None is no cap (docs/scheduling.md)."""

    weight: float = 1.0  # of its fair share
    tokens_per_minute: int | None = None  # computed for it
    concurrent_jobs: int | None = None  # that train at once; further ones wait
    total_steps: int | None = None  # of all its jobs, ever; a job beyond is refused
    pinned_bytes: int | None = None  # of its pinned checkpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class TermChanges:
    """What an operator sets of a tenant's terms: None leaves it as it is, a cap of 0 takes the cap away."""

    weight: float | None = None
    tokens_per_minute: int | None = None
    concurrent_jobs: int | None = None
    total_steps: int | None = None
    pinned_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """What is known of an API key; the key itself is shown once and never stored."""

    key_id: str  # "key-" and 16 hex digits, names the key without revealing it
    tenant_id: str  # whose jobs the key opens
    tenant_name: str  # that tenant's name, for listings
    scopes: frozenset[str]  # what it may do, as "jobs:read"; "*" is everything
    created_at: str
    last_used_at: str | None  # exact to a minute
    revoked_at: str | None  # from then on the key opens nothing
    expires_at: str | None = None  # likewise; None: it does not end by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A checked request, ready to become a job. Its data lie in object storage already."""

    tenant_id: str  # who asks
    name: str  # from the spec; not unique
    base_model: str  # from the spec
    spec_json: str  # the whole cola_runtime.spec.JobSpec
    total_steps: int  # optimizer steps that the job will take
    encoding: str  # how taps travel, already planned: str(TapPlan), as "adapter_gradient" or "mixed+int8"
    training_key: str  # storage key of the training JSONL
    request_digest: str  # sha256 over spec and data: tells a repeated request from another one
    training_name: str = ""  # the tenant's file name, for messages about lines
    evaluation_key: str | None = None  # storage key of the held-out JSONL
    evaluation_name: str = ""
    idempotency_key: str | None = None  # same key and same request: the same job
    deadline_seconds: float | None = None  # from its creation; None: it may end whenever
    job_id: str = field(default_factory=new_job_id)  # made before, so that storage keys can hold it


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """One job as it stands. The record is the truth; whatever else is known of a job can be rebuilt."""

    job_id: str  # "job-" and 32 hex digits
    tenant_id: str  # whose job it is
    tenant_name: str
    name: str
    base_model: str
    spec_json: str
    state: JobState
    version: int  # steps applied and recorded
    total_steps: int
    epoch: int  # of the newest lease; 0 before the first
    device_id: str | None  # holder of the open lease; of a sharded adapter all of them: Lease.devices
    encoding: str
    training_key: str
    training_name: str
    evaluation_key: str | None
    evaluation_name: str
    idempotency_key: str | None
    request_digest: str
    created_at: str
    started_at: str | None  # first time running
    finished_at: str | None  # set exactly in a terminal state
    failure_reason: str | None  # stable reason code, set exactly when failed
    failure_message: str | None
    evaluation_loss_before: float | None  # held-out loss of the evaluation at step 0
    evaluation_loss_after: float | None  # held-out loss of the newest evaluation behind step 0
    last_loss: float | None  # of step `version`
    tokens: int  # trained on, over the recorded steps
    label_tokens: int  # of these, labels
    bytes_up: int  # base model -> device, rewound steps included: they were spent
    bytes_down: int  # device -> base model, likewise
    base_seconds: float  # this job's share of base steps, evaluations included, likewise
    device_seconds: float  # likewise
    evaluation_tokens: int  # of held-out rows, over the recorded evaluations
    repeated_steps: int  # that a rewind took from the record, to be made again
    deadline_at: str | None  # when it should have ended; None: whenever
    deadline_missed_at: str | None  # when it was seen that it had not
    stale: bool = False  # it is what the coordinator last knew: the job store could not be read

    @property
    def ended(self) -> bool:
        return self.state in TERMINAL_STATES


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What all jobs of a tenant have used. It counts what is recorded with a step or an evaluation.

    Steps and tokens are those of the record as it stands; bytes and seconds also of steps that were repeated
    because a device or the service was lost: they were spent.
    """

    tenant: str
    jobs: int
    steps: int
    repeated_steps: int
    tokens: int  # trained on
    label_tokens: int
    evaluation_tokens: int
    base_seconds: float  # in base steps: each one's seconds are shared by tokens
    device_seconds: float
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLoad:
    """A tenant's jobs that are queued or running."""

    tenant_id: str
    jobs: int
    weight: float  # of its fair share


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One applied optimizer step. Its loss is the one before the step, at version `step - 1`."""

    job_id: str
    epoch: int  # of the lease it was applied under
    step: int  # from 1; the adapter's version after it
    loss: float  # mean over the step's label tokens
    learning_rate: float
    gradient_norm: float  # over all sites, before clipping
    tokens: int
    label_tokens: int
    device_id: str
    bytes_up: int = 0  # base model -> device, frame headers included
    bytes_down: int = 0  # device -> base model
    base_seconds: float = 0.0  # this job's share, by computed tokens
    device_seconds: float = 0.0
    applied_at: str = ""  # the store stamps it when empty
    chain: str = ""  # the version's links in the update chain, hex, one a shard (update_chain.py)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """What the held-out rows gave at one version. The best one is the newest that improved."""

    job_id: str
    step: int  # the version that was evaluated; 0 is before the first step
    epoch: int  # of the lease it was made under
    metrics: Mapping[str, float]  # "loss" always; others by the job's task
    primary: str  # the name of the metric that the job compares by
    greater_is_better: bool  # of the primary metric
    improved: bool  # over the best one before, by more than the job's min_delta; the first one always
    created_at: str = ""  # the store stamps it when empty
    tokens: int = 0  # of the held-out rows
    base_seconds: float = 0.0  # this job's share of the base steps that computed them

    @property
    def value(self) -> float:
        return self.metrics[self.primary]


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord:
    """One line of a job's history. Events are only ever added."""

    id: int  # grows over all jobs; a reader continues after the last one it saw
    job_id: str
    created_at: str
    kind: str  # stable key, as "step.applied"
    level: str  # "info", "warning" or "error"
    message: str  # a sentence for people
    data: Mapping[str, Any]  # the same for programs


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """A checkpoint that lies complete in object storage: the record is written after the object."""

    job_id: str
    version: int  # steps applied in it
    epoch: int  # of the lease that made it
    storage_key: str
    bytes: int  # of a sharded adapter, those of all shards
    sha256: str  # of the object, hex; of a sharded adapter that is the index of its shards' objects
    created_at: str = ""  # the store stamps it when empty
    checked_at: str | None = None  # when a spot check found that it follows from the one before
    pinned_at: str | None = None  # since when it is kept for good, at its tenant's request

    @property
    def pinned(self) -> bool:
        return self.pinned_at is not None
