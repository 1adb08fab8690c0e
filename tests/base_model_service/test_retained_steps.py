"""What is kept for a spot check: whole steps in their order, within a bound, and no longer than asked."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cola_runtime.base_model import retained_files
from cola_runtime.base_model.gradient_server import GradientServer
from cola_runtime.base_model.retained import RetainedSteps
from cola_runtime.base_model.retained_files import KEPT_SECONDS, RetainedFiles
from cola_runtime.errors import NotFound
from cola_runtime.proto import control_pb2
from cola_runtime.transport.frames import TensorAddress
from cola_runtime.transport.tensors import Parcel, parcels
from cola_runtime.types import Lease, Replay, TensorKey, TensorKind

LEASE = Lease(job_id="job-" + "0a" * 16, epoch=1, device_id="d1")
WEIGHTS_P = torch.ones(25)  # 100 bytes


def parcel() -> Parcel:
    [made] = parcels({TensorKey(0, TensorKind.GRAD_LORA_A): torch.ones(25)})
    return made


async def keep(kept: RetainedSteps, version: int, *, lease: Lease = LEASE) -> None:
    address = TensorAddress(lease.job_id, lease.epoch, version, TensorKind.BLOB)
    kept.sent_parcel(lease, version, address, parcel())
    end = control_pb2.MicrobatchEnd(version=version)
    kept.sent_control(lease, version, control_pb2.GradientControl(microbatch_end=end))
    await kept.received(lease, version + 1, WEIGHTS_P)


def versions(kept: RetainedSteps, first: int, last: int) -> list[int] | None:
    steps = kept.steps(Replay(lease=LEASE, first=first, last=last))
    if steps is None:
        return None
    ends = [each.microbatch_end for each in steps if isinstance(each, control_pb2.GradientControl)]
    return [end.version for end in ends]


async def test_an_interval_is_there_whole_or_not_at_all() -> None:
    kept = RetainedSteps()
    for version in (2, 3, 4):
        await keep(kept, version)
    assert versions(kept, 2, 5) == [2, 3, 4]
    assert versions(kept, 3, 5) == [3, 4]
    assert versions(kept, 1, 5) is None
    assert versions(kept, 2, 6) is None
    kept.forget(LEASE.job_id, LEASE.epoch, before=3)
    assert versions(kept, 3, 5) == [3, 4]
    assert versions(kept, 2, 5) is None
    assert kept.weights(LEASE, 3) is None


async def test_a_lease_that_goes_beyond_the_bound_keeps_nothing_and_leaves_others_theirs() -> None:
    kept = RetainedSteps(most_bytes=1500)
    other = Lease(job_id="job-" + "0b" * 16, epoch=1, device_id="d2")
    await keep(kept, 0)
    for version in range(5):
        await keep(kept, version, lease=other)
    assert versions(kept, 0, 1) == [0]
    assert kept.weights(other, 1) is None
    await keep(kept, 5, lease=other)
    assert kept.weights(other, 6) is None, "nor later on"
    kept.forget(other.job_id, other.epoch, before=9)
    await keep(kept, 9, lease=other)
    assert kept.weights(other, 10) is not None, "until all of it is forgotten"


async def test_what_came_back_for_steps_that_were_not_drawn_is_not_kept() -> None:
    kept = RetainedSteps()
    await kept.received(LEASE, 1, WEIGHTS_P)
    assert kept.weights(LEASE, 1) is None


def test_a_replay_of_what_is_not_kept_is_refused() -> None:
    server = GradientServer(join_token="", on_update=lambda update: None, on_event=lambda event: None)
    with pytest.raises(NotFound) as refused:
        server.replay(LEASE, Replay(lease=LEASE, first=0, last=1))
    assert refused.value.reason == "STEPS_NOT_RETAINED"


async def test_steps_that_are_whole_are_there_for_the_process_after_this_one(tmp_path: Path) -> None:
    sent = torch.arange(25.0)
    [parcel_of_two] = parcels(
        {
            TensorKey(0, TensorKind.GRAD_LORA_A): sent[:10].reshape(2, 5),
            TensorKey(3, TensorKind.GRAD_LORA_B, 1): sent[10:],
        }
    )
    address = TensorAddress(LEASE.job_id, LEASE.epoch, 4, TensorKind.BLOB, microbatch=2)
    files = RetainedFiles(tmp_path)
    kept = RetainedSteps(files=files)
    await keep(kept, 3)
    kept.sent_parcel(LEASE, 4, address, parcel_of_two)
    kept.received_norms(LEASE, 4, [0.5, 1 / 3])
    await kept.received(LEASE, 5, WEIGHTS_P)
    await keep(kept, 5, lease=replace(LEASE, device_id="d2"))
    kept.sent_parcel(LEASE, 5, address, parcel_of_two)  # of a step that is not whole
    files.close()

    again = RetainedSteps(files=RetainedFiles(tmp_path))
    replay = Replay(lease=LEASE, first=3, last=5)
    await again.recall(replay)
    assert versions(again, 3, 5) == [3]
    assert again.norms_distance(replay, 4, [0.5, 1 / 3]) == 0.0
    found = [
        each for each in again.steps(Replay(lease=LEASE, first=4, last=5)) or () if isinstance(each, tuple)
    ]
    assert [each[0] for each in found] == [address]
    frames = [[b"".join(frame) for frame in each.frames(address)] for each in (found[0][1], parcel_of_two)]
    assert frames[0] == frames[1]
    assert torch.equal(again.weights(LEASE, 5), WEIGHTS_P)  # type: ignore[arg-type]
    await again.recall(Replay(lease=LEASE, first=5, last=6))
    assert versions(again, 5, 6) is None
    again.forget(LEASE.job_id, LEASE.epoch, before=9)
    again._files.close()  # type: ignore[union-attr]
    assert not list(tmp_path.iterdir())  # noqa: ASYNC240


async def test_a_lease_that_goes_beyond_the_bound_leaves_no_files(tmp_path: Path) -> None:
    files = RetainedFiles(tmp_path)
    kept = RetainedSteps(most_bytes=1000, files=files)
    for version in range(5):
        await keep(kept, version)
    files.close()
    assert not list(tmp_path.iterdir())  # noqa: ASYNC240


async def test_a_process_that_runs_on_lets_go_of_leases_that_nobody_has_asked_for_since_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = RetainedFiles(tmp_path)
    kept = RetainedSteps(files=files)
    await keep(kept, 3)
    [folder] = tmp_path.iterdir()  # noqa: ASYNC240
    long_ago = time.time() - KEPT_SECONDS - 1.0
    os.utime(folder, (long_ago, long_ago))
    monkeypatch.setattr(retained_files, "SWEEP_SECONDS", 0.0)
    await keep(kept, 3, lease=replace(LEASE, epoch=LEASE.epoch + 1))
    files.close()
    assert [each.name for each in tmp_path.iterdir()] == [f"{LEASE.job_id}-{LEASE.epoch + 1}"]  # noqa: ASYNC240


async def test_norms_that_differ_are_told_by_how_much() -> None:
    kept = RetainedSteps()
    kept.received_norms(LEASE, 1, [1.0])
    with pytest.raises(NotFound):
        kept.norms_distance(Replay(lease=LEASE, first=1, last=2), 1, [1.0])
    await keep(kept, 1)
    kept.received_norms(LEASE, 1, [3.0, 4.0])
    assert kept.norms_distance(Replay(lease=LEASE, first=1, last=2), 1, [3.0, 4.5]) == pytest.approx(0.1)


def kept_files(folder: Path) -> list[Path]:
    return [*folder.rglob("*.safetensors")]


@pytest.mark.parametrize("damage", [b"", b"no tensors", None], ids=["empty", "garbage", "cut"])
async def test_a_step_whose_file_is_damaged_counts_as_not_kept(tmp_path: Path, damage: bytes | None) -> None:
    files = RetainedFiles(tmp_path)
    kept = RetainedSteps(files=files)
    for version in (3, 4):
        await keep(kept, version)
    files.close()
    [path] = [each for each in kept_files(tmp_path) if ".3." in each.name]
    path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)

    again = RetainedSteps(files=RetainedFiles(tmp_path))
    await again.recall(Replay(lease=LEASE, first=3, last=5))
    assert again.weights(LEASE, 4) is None
    assert again.weights(LEASE, 5) is not None
