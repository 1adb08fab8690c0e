"""What a device's worker refuses: a grant without its checkpoint, a norm for a step that is not complete."""

from __future__ import annotations

import pytest
import torch

from cola_runtime.device.answers import Refused, Update
from cola_runtime.device.worker import DeviceWorker
from cola_runtime.proto import control_pb2
from cola_runtime.transport import control
from cola_runtime.transport.frames import DType, TensorAddress
from cola_runtime.transport.reader import ReceivedTensor
from cola_runtime.transport.stream import ReceivedControl
from cola_runtime.types import Lease, Site, SiteKind, TensorKind
from tests.device.adapter_samples import SITES, definition
from tests.limits import no_more_memory

LEASE = Lease(job_id="job-" + "0" * 32, epoch=1, device_id="d1")


HUGE = Site(index=0, name="up", kind=SiteKind.LINEAR, in_features=1 << 22, out_features=8, input_group=0)


def grant(
    *, checkpoint_bytes: int = 0, shards: int = 1, sites: tuple[Site, ...] = SITES
) -> control_pb2.LeaseGrant:
    training = definition(sites=sites)
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


def test_an_adapter_that_the_process_gets_no_memory_for_is_refused_by_name_and_the_next_one_is_taken() -> (
    None
):
    worker = DeviceWorker()
    with no_more_memory(but_bytes=8 << 20):
        answer = worker.grant(grant(sites=(HUGE,)), None)
    assert isinstance(answer, Refused)
    assert answer.reason == "DEVICE_OUT_OF_MEMORY"
    assert (worker.idle, worker.resident_bytes) == (True, 0)
    assert isinstance(worker.grant(grant(), None), Update)


def test_a_step_that_the_process_gets_no_memory_for_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = DeviceWorker()
    worker.grant(grant(), None)

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("cola_runtime.device.worker._add_to", refused)
    item = ReceivedTensor(
        address=TensorAddress(LEASE.job_id, LEASE.epoch, 0, TensorKind.LORA_A),
        dtype=DType.FLOAT32,
        shape=(3, 12),
        data=memoryview(torch.ones(3, 12).numpy()).cast("B"),
        wire_bytes=144,
    )
    (answer,) = worker.consume([item]).answers
    assert isinstance(answer, Refused)
    assert answer.reason == "DEVICE_OUT_OF_MEMORY"
    assert worker.consume([item]).answers == [], "a refused lease takes no more"
