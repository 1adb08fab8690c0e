"""Values of `cola_runtime.types` to and from the control messages' definitions."""

from __future__ import annotations

from cola_runtime.errors import ProtocolError
from cola_runtime.proto import control_pb2
from cola_runtime.types import (
    AdapterSpec,
    LearningRateSchedule,
    Lease,
    OptimizerHyperparameters,
    Site,
    SiteKind,
)


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
) -> control_pb2.DeviceControl:
    """The LeaseGrant that follows the checkpoint's BLOB frames, if there are any."""
    grant = control_pb2.LeaseGrant(
        lease=lease_to_proto(lease),
        adapter=spec_to_proto(spec),
        optimizer=optimizer_to_proto(optimizer),
        schedule=control_pb2.ScheduleDefinition(
            kind=schedule.kind, warmup_steps=schedule.warmup_steps, total_steps=schedule.total_steps
        ),
        checkpoint_bytes=checkpoint_bytes,
        checkpoint_every=checkpoint_every,
    )
    return control_pb2.DeviceControl(lease_grant=grant)


def spec_to_proto(spec: AdapterSpec) -> control_pb2.AdapterDefinition:
    sites = [
        control_pb2.SiteShape(
            index=site.index,
            name=site.name,
            kind=site.kind.value,
            in_features=site.in_features,
            out_features=site.out_features,
            input_group=site.input_group,
        )
        for site in spec.sites
    ]
    return control_pb2.AdapterDefinition(
        rank=spec.rank,
        alpha=spec.alpha,
        use_rslora=spec.use_rslora,
        seed=spec.seed,
        sites=sites,
        dtype=spec.dtype,
    )


def spec_from_proto(message: control_pb2.AdapterDefinition) -> AdapterSpec:
    """Raises ProtocolError ADAPTER_INVALID for a definition that no adapter can have."""
    if message.rank < 1 or message.dtype not in ("float32", "float64") or not message.sites:
        raise ProtocolError(
            "ADAPTER_INVALID",
            f"rank {message.rank}, dtype {message.dtype!r}, {len(message.sites)} sites",
        )
    return AdapterSpec(
        rank=message.rank,
        alpha=message.alpha,
        use_rslora=message.use_rslora,
        seed=message.seed,
        sites=tuple(_site_from_proto(site) for site in message.sites),
        dtype=message.dtype,
    )


def _site_from_proto(message: control_pb2.SiteShape) -> Site:
    try:
        kind = SiteKind(message.kind)
    except ValueError as error:
        raise ProtocolError("ADAPTER_INVALID", f"site kind {message.kind!r} is unknown") from error
    return Site(
        index=message.index,
        name=message.name,
        kind=kind,
        in_features=message.in_features,
        out_features=message.out_features,
        input_group=message.input_group,
    )


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
    )


def schedule_from_proto(message: control_pb2.ScheduleDefinition) -> LearningRateSchedule:
    return LearningRateSchedule(
        kind=message.kind, warmup_steps=message.warmup_steps, total_steps=message.total_steps
    )
