"""Records of the job store -> messages of cola.v1.Jobs."""

from __future__ import annotations

import dataclasses
import json

from cola_runtime.jobs.records import ApiKey, CheckpointRecord, EventRecord, JobRecord, StepRecord
from cola_runtime.proto import jobs_pb2
from cola_runtime.server.service import Overview
from cola_runtime.types import BaseModelDescription


def job_message(job: JobRecord, waiting_reason: str) -> jobs_pb2.Job:
    return jobs_pb2.Job(
        job_id=job.job_id,
        name=job.name,
        state=job.state.value,
        base_model=job.base_model,
        version=job.version,
        total_steps=job.total_steps,
        device_id=job.device_id or "",
        waiting_reason=waiting_reason,
        created_at=job.created_at,
        finished_at=job.finished_at or "",
        failure_reason=job.failure_reason or "",
        failure_message=job.failure_message or "",
        evaluation_loss_before=job.evaluation_loss_before,
        evaluation_loss_after=job.evaluation_loss_after,
        last_loss=job.last_loss,
        tokens=job.tokens,
        label_tokens=job.label_tokens,
        bytes_up=job.bytes_up,
        bytes_down=job.bytes_down,
        spec_json=job.spec_json,
        tenant=job.tenant_name,
        encoding=job.encoding,
        base_seconds=job.base_seconds,
        device_seconds=job.device_seconds,
    )


def event_message(event: EventRecord) -> jobs_pb2.Event:
    return jobs_pb2.Event(
        id=event.id,
        job_id=event.job_id,
        created_at=event.created_at,
        kind=event.kind,
        level=event.level,
        message=event.message,
        data_json=json.dumps(dict(event.data), ensure_ascii=False),
    )


def step_message(step: StepRecord) -> jobs_pb2.Step:
    return jobs_pb2.Step(
        step=step.step,
        loss=step.loss,
        learning_rate=step.learning_rate,
        gradient_norm=step.gradient_norm,
        tokens=step.tokens,
        label_tokens=step.label_tokens,
        bytes_up=step.bytes_up,
        bytes_down=step.bytes_down,
        base_seconds=step.base_seconds,
        device_seconds=step.device_seconds,
        device_id=step.device_id,
        epoch=step.epoch,
        applied_at=step.applied_at,
    )


def checkpoint_message(checkpoint: CheckpointRecord) -> jobs_pb2.Checkpoint:
    return jobs_pb2.Checkpoint(
        version=checkpoint.version,
        bytes=checkpoint.bytes,
        sha256=checkpoint.sha256,
        created_at=checkpoint.created_at,
    )


def key_message(key: ApiKey) -> jobs_pb2.Key:
    return jobs_pb2.Key(
        key_id=key.key_id,
        tenant=key.tenant_name,
        scopes=sorted(key.scopes),
        created_at=key.created_at,
        last_used_at=key.last_used_at or "",
        revoked_at=key.revoked_at or "",
    )


def description_message(overview: Overview, version: str) -> jobs_pb2.ServiceDescription:
    return jobs_pb2.ServiceDescription(
        version=version,
        tenant=overview.tenant.name,
        base_models=map(_base_model, overview.base_models),
        devices=[jobs_pb2.DeviceInfo(**dataclasses.asdict(device)) for device in overview.devices],
        base_busy_seconds=overview.statistics.base_busy_seconds,
        uptime_seconds=overview.statistics.uptime_seconds,
        base_steps=overview.statistics.base_steps,
    )


def _base_model(model: BaseModelDescription) -> jobs_pb2.BaseModelInfo:
    return jobs_pb2.BaseModelInfo(
        name=model.name,
        architecture=model.architecture,
        context_length=model.context_length,
        dtype=model.dtype,
        parameters=model.parameters,
        sites=[site.name for site in model.sites],
        details=model.details,
    )
