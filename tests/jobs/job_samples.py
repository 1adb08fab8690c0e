"""A clock that is moved by hand, and short ways to make records."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cola_runtime.jobs.records import EvaluationRecord, NewJob, StepRecord, Tenant
from cola_runtime.jobs.state import Trigger
from cola_runtime.jobs.store import JobStore
from cola_runtime.types import Lease


class HandClock:
    """Moves only when told."""

    def __init__(self) -> None:
        self.moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.moment

    def forward(self, *, seconds: float) -> None:
        self.moment += timedelta(seconds=seconds)


def new_job(
    tenant: Tenant,
    *,
    name: str = "chat",
    total_steps: int = 5,
    idempotency_key: str | None = None,
    digest: str = "d1",
) -> NewJob:
    return NewJob(
        tenant_id=tenant.tenant_id,
        name=name,
        base_model="tiny",
        spec_json='{"name": "chat"}',
        total_steps=total_steps,
        encoding="adapter_gradient",
        training_key="datasets/x/training.jsonl",
        training_name="train.jsonl",
        request_digest=digest,
        idempotency_key=idempotency_key,
    )


def step(lease: Lease, number: int, *, loss: float = 2.0, tokens: int = 10) -> StepRecord:
    return StepRecord(
        job_id=lease.job_id,
        epoch=lease.epoch,
        step=number,
        loss=loss,
        learning_rate=1e-3,
        gradient_norm=0.5,
        tokens=tokens,
        label_tokens=tokens // 2,
        device_id=lease.device_id,
        bytes_up=100,
        bytes_down=50,
        base_seconds=0.25,
        device_seconds=0.125,
    )


def evaluation(lease: Lease, step: int, *, loss: float = 2.0, improved: bool = True) -> EvaluationRecord:
    return EvaluationRecord(
        job_id=lease.job_id,
        step=step,
        epoch=lease.epoch,
        metrics={"loss": loss, "perplexity": 9.5},
        primary="loss",
        greater_is_better=False,
        improved=improved,
    )


async def running(store: JobStore, tenant: Tenant, *, total_steps: int = 5) -> Lease:
    """A job that is running on device-1."""
    job = await store.create_job(new_job(tenant, total_steps=total_steps))
    await store.transition(job.job_id, Trigger.START)
    return await store.grant_lease(job.job_id, "device-1")
