"""What a device's worker refuses: a grant without its checkpoint, a norm for a step that is not complete."""

from __future__ import annotations

from cola_runtime.device.answers import Refused, Update
from cola_runtime.device.worker import DeviceWorker
from cola_runtime.proto import control_pb2
from cola_runtime.transport import control
from cola_runtime.transport.stream import ReceivedControl
from cola_runtime.types import Lease
from tests.device.adapter_samples import definition

LEASE = Lease(job_id="job-" + "0" * 32, epoch=1, device_id="d1")


def grant(*, checkpoint_bytes: int = 0, shards: int = 1) -> control_pb2.LeaseGrant:
    training = definition()
    message = control.lease_grant(
        LEASE,
        training.spec,
        optimizer=training.optimizer,
        schedule=training.schedule,
        checkpoint_bytes=checkpoint_bytes,
        checkpoint_every=0,
        gradient_endpoint="127.0.0.1:1",
        shards=shards,
        max_staleness=0,
    )
    return message.lease_grant


def test_a_grant_whose_checkpoint_did_not_come_is_refused() -> None:
    worker = DeviceWorker()
    for checkpoint in (None, b"half"):
        answer = worker.grant(grant(checkpoint_bytes=8), checkpoint)
        assert isinstance(answer, Refused)
        assert answer.reason == "CHECKPOINT_MISSING"
    assert worker.idle


def test_a_norm_for_a_step_that_is_not_complete_here_is_refused() -> None:
    worker = DeviceWorker()
    assert isinstance(worker.grant(grant(shards=2), None), Update)
    of_all = control_pb2.GlobalNorm(lease=control.lease_to_proto(LEASE), version=0, norm=1.0)
    (answer,) = worker.consume([ReceivedControl(control_pb2.GradientControl(global_norm=of_all), 0)]).answers
    assert isinstance(answer, Refused)
    assert answer.reason == "NORM_UNEXPECTED"
