"""Records of the job store -> messages of cola.v1.Jobs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from cola_runtime.jobs.records import (
    ApiKey,
    CheckpointRecord,
    EvaluationRecord,
    EventRecord,
    JobRecord,
    StepRecord,
    Usage,
)
from cola_runtime.proto import jobs_pb2
from cola_runtime.scheduler.replicas import ReplicaStatus
from cola_runtime.server.estimates import JobEstimate
from cola_runtime.server.service import Overview
from cola_runtime.types import BaseModelDescription

Answer = TypeVar("Answer", bound=Message)


def job_message(job: JobRecord, waiting_reason: str, replica: str) -> jobs_pb2.Job:
    return _message(jobs_pb2.Job, job, tenant=job.tenant_name, waiting_reason=waiting_reason, replica=replica)


def event_message(event: EventRecord) -> jobs_pb2.Event:
    return _message(jobs_pb2.Event, event, data_json=json.dumps(dict(event.data), ensure_ascii=False))


def step_message(step: StepRecord) -> jobs_pb2.Step:
    return _message(jobs_pb2.Step, step)


def evaluation_message(evaluation: EvaluationRecord, *, best_step: int | None) -> jobs_pb2.Evaluation:
    return _message(jobs_pb2.Evaluation, evaluation, best=evaluation.step == best_step)


def checkpoint_message(checkpoint: CheckpointRecord, *, best_step: int | None) -> jobs_pb2.Checkpoint:
    return _message(jobs_pb2.Checkpoint, checkpoint, best=checkpoint.version == best_step)


def estimate_message(estimate: JobEstimate) -> jobs_pb2.JobEstimate:
    return _message(jobs_pb2.JobEstimate, estimate)


def usage_message(usage: Usage) -> jobs_pb2.Usage:
    return _message(jobs_pb2.Usage, usage)


def key_message(key: ApiKey) -> jobs_pb2.Key:
    return _message(jobs_pb2.Key, key, tenant=key.tenant_name, scopes=sorted(key.scopes))


def description_message(
    overview: Overview, version: str, quarantined: Iterable[str]
) -> jobs_pb2.ServiceDescription:
    return _message(
        jobs_pb2.ServiceDescription,
        overview.statistics,
        version=version,
        tenant=overview.tenant.name,
        degraded=overview.degraded,
        base_models=[_base_model(model, overview.statistics.replicas) for model in overview.base_models],
        devices=[_message(jobs_pb2.DeviceInfo, device) for device in overview.devices],
        quarantined_devices=quarantined,
    )


def _base_model(model: BaseModelDescription, replicas: Sequence[ReplicaStatus]) -> jobs_pb2.BaseModelInfo:
    own = [_message(jobs_pb2.ReplicaInfo, each) for each in replicas if each.base_model == model.name]
    sites = [site.name for site in model.sites]
    return _message(jobs_pb2.BaseModelInfo, model, sites=sites, replicas=own)


def _message(kind: type[Answer], record: object, **others: Any) -> Answer:
    """`kind` with the fields of the same names of `record`, but `others` as given; None leaves a field unset.

    The message decides what leaves the service: a record's other fields, as storage keys, stay here.
    """
    names = kind.DESCRIPTOR.fields_by_name.keys() - others.keys()
    return kind(**{name: getattr(record, name) for name in names}, **others)
