"""What is kept for a spot check: whole steps in their order, within a bound, and no longer than asked."""

from __future__ import annotations

import pytest
import torch

from cola_runtime.base_model.gradient_server import GradientServer
from cola_runtime.base_model.retained import RetainedSteps
from cola_runtime.errors import NotFound
from cola_runtime.proto import control_pb2
from cola_runtime.transport.frames import TensorAddress
from cola_runtime.transport.tensors import Parcel, parcels
from cola_runtime.types import Lease, Replay, Segment, TensorKey, TensorKind

LEASE = Lease(job_id="job-" + "0a" * 16, epoch=1, device_id="d1")
WEIGHTS_P = torch.ones(25)  # 100 bytes


def parcel() -> Parcel:
    [made] = parcels({TensorKey(0, TensorKind.GRAD_LORA_A): torch.ones(25)})
    return made


def keep(kept: RetainedSteps, version: int, *, lease: Lease = LEASE) -> None:
    segment = Segment(lease=lease, version=version, rows=(), loss_denominator=1.0, retained=True)
    address = TensorAddress(lease.job_id, lease.epoch, version, TensorKind.BLOB)
    kept.sent_parcel(segment, address, parcel())
    kept.sent_end(segment, control_pb2.MicrobatchEnd(version=version))
    kept.received(lease, version + 1, WEIGHTS_P)


def versions(kept: RetainedSteps, first: int, last: int) -> list[int] | None:
    steps = kept.steps(Replay(lease=LEASE, first=first, last=last))
    if steps is None:
        return None
    ends = [each for each in steps if isinstance(each, control_pb2.MicrobatchEnd)]
    return [end.version for end in ends]


def test_an_interval_is_there_whole_or_not_at_all() -> None:
    kept = RetainedSteps()
    for version in (2, 3, 4):
        keep(kept, version)
    assert versions(kept, 2, 5) == [2, 3, 4]
    assert versions(kept, 3, 5) == [3, 4]
    assert versions(kept, 1, 5) is None
    assert versions(kept, 2, 6) is None
    kept.forget(LEASE.job_id, LEASE.epoch, before=3)
    assert versions(kept, 3, 5) == [3, 4]
    assert versions(kept, 2, 5) is None
    assert kept.weights(LEASE, 3) is None


def test_a_lease_that_goes_beyond_the_bound_keeps_nothing_and_leaves_others_theirs() -> None:
    kept = RetainedSteps(most_bytes=1500)
    other = Lease(job_id="job-" + "0b" * 16, epoch=1, device_id="d2")
    keep(kept, 0)
    for version in range(5):
        keep(kept, version, lease=other)
    assert versions(kept, 0, 1) == [0]
    assert kept.weights(other, 1) is None
    keep(kept, 5, lease=other)
    assert kept.weights(other, 6) is None, "nor later on"
    kept.forget(other.job_id, other.epoch, before=9)
    keep(kept, 9, lease=other)
    assert kept.weights(other, 10) is not None, "until all of it is forgotten"


def test_what_came_back_for_steps_that_were_not_drawn_is_not_kept() -> None:
    kept = RetainedSteps()
    kept.received(LEASE, 1, WEIGHTS_P)
    assert kept.weights(LEASE, 1) is None


def test_a_replay_of_what_is_not_kept_is_refused() -> None:
    server = GradientServer(join_token="", on_update=lambda update: None, on_event=lambda event: None)
    with pytest.raises(NotFound) as refused:
        server.replay(LEASE, Replay(lease=LEASE, first=0, last=1))
    assert refused.value.reason == "STEPS_NOT_RETAINED"
