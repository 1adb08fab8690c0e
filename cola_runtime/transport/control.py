"""Values of `cola_runtime.types` to and from the control messages' definitions."""

from __future__ import annotations

import json
import re

from cola_runtime.adapter_spec import AdapterSpec, adapter_spec_from_fields
from cola_runtime.errors import InvalidInput, ProtocolError
from cola_runtime.proto import control_pb2
from cola_runtime.types import LearningRateSchedule, Lease, OptimizerHyperparameters

MAX_TOLD_CHARACTERS = 500
_REASON = re.compile(r"[A-Z][A-Z0-9_]{1,63}")


def lease_to_proto(lease: Lease) -> control_pb2.LeaseRef:
    return control_pb2.LeaseRef(job_id=lease.job_id, epoch=lease.epoch, device_id=lease.device_id)


def lease_from_proto(message: control_pb2.LeaseRef) -> Lease:
    return Lease(job_id=message.job_id, epoch=message.epoch, device_id=message.device_id)


def lease_grant(
    lease: Lease,
    spec: AdapterSpec,
    *,
    optimizer: OptimizerHyperparameters,
    schedule: LearningRateSchedule,
    checkpoint_bytes: int,
    checkpoint_every: int,
    gradient_endpoint: str,
    max_staleness: int = 0,
    shards: int = 1,
    chain: bytes = b"",
) -> control_pb2.DeviceControl:
    """The LeaseGrant that follows the checkpoint's BLOB frames, if there are any.

    `gradient_endpoint` is the base model replica's. With `shards` above 1, `spec` is one of so many.
    `chain` is the checkpoint's recorded link.
    """
    grant = control_pb2.LeaseGrant(
        lease=lease_to_proto(lease),
        adapter=spec_to_proto(spec),
        optimizer=optimizer_to_proto(optimizer),
        schedule=control_pb2.ScheduleDefinition(
            kind=schedule.kind, warmup_steps=schedule.warmup_steps, total_steps=schedule.total_steps
        ),
        checkpoint_bytes=checkpoint_bytes,
        checkpoint_every=checkpoint_every,
        max_staleness=max_staleness,
        shards=shards,
        gradient_endpoint=gradient_endpoint,
        chain=chain,
    )
    return control_pb2.DeviceControl(lease_grant=grant)


def told_by_device(reason: str, message: str) -> tuple[str, str]:
    """What a device says of a lease, as far as it may be written down and shown to tenants."""
    known = _REASON.fullmatch(reason) is not None
    return reason if known else "DEVICE_REFUSED", message[:MAX_TOLD_CHARACTERS]


def spec_to_proto(spec: AdapterSpec) -> control_pb2.AdapterDefinition:
    return control_pb2.AdapterDefinition(spec_json=spec.model_dump_json())


def spec_from_proto(message: control_pb2.AdapterDefinition) -> AdapterSpec:
    """Raises ProtocolError ADAPTER_INVALID for a definition that no adapter can have."""
    try:
        return adapter_spec_from_fields(json.loads(message.spec_json))
    except (InvalidInput, ValueError, RecursionError) as error:
        raise ProtocolError("ADAPTER_INVALID", str(error)) from error


def optimizer_to_proto(optimizer: OptimizerHyperparameters) -> control_pb2.OptimizerDefinition:
    return control_pb2.OptimizerDefinition(
        kind=optimizer.kind,
        learning_rate=optimizer.learning_rate,
        beta1=optimizer.betas[0],
        beta2=optimizer.betas[1],
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        momentum=optimizer.momentum,
        nesterov=optimizer.nesterov,
        max_grad_norm=optimizer.max_grad_norm,
        beta2_decay=optimizer.beta2_decay,
        eps1=optimizer.eps1,
        eps2=optimizer.eps2,
        d=optimizer.d,
        inner_steps=optimizer.inner_steps,
    )


def optimizer_from_proto(message: control_pb2.OptimizerDefinition) -> OptimizerHyperparameters:
    return OptimizerHyperparameters(
        kind=message.kind,
        learning_rate=message.learning_rate,
        betas=(message.beta1, message.beta2),
        eps=message.eps,
        weight_decay=message.weight_decay,
        momentum=message.momentum,
        nesterov=message.nesterov,
        max_grad_norm=message.max_grad_norm if message.HasField("max_grad_norm") else None,
        beta2_decay=message.beta2_decay,
        eps1=message.eps1 if message.HasField("eps1") else None,
        eps2=message.eps2,
        d=message.d,
        inner_steps=message.inner_steps,
    )


def schedule_from_proto(message: control_pb2.ScheduleDefinition) -> LearningRateSchedule:
    return LearningRateSchedule(
        kind=message.kind, warmup_steps=message.warmup_steps, total_steps=message.total_steps
    )
