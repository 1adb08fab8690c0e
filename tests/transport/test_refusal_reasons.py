"""Refusals that need no service: each is brought about once, and has its reason."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from serving import description

from cola_runtime.adapters.flat_layout import FlatLayout
from cola_runtime.adapters.schedule import learning_rate
from cola_runtime.base_model.device_link import DeviceLink
from cola_runtime.base_model.sent_taps import SentTaps
from cola_runtime.cli.device import device_config
from cola_runtime.cli.job_file import read_job_file
from cola_runtime.cli.keys import _in_store
from cola_runtime.client.channel import call_metadata
from cola_runtime.client.folders import NewFolder, new_folder
from cola_runtime.client.uploads import upload_of
from cola_runtime.config import ClientSettings, JoinSettings
from cola_runtime.device.optimizer import build_optimizer
from cola_runtime.errors import ColaError
from cola_runtime.jobs.plan import training_plan
from cola_runtime.jobs.records import TermChanges
from cola_runtime.jobs.store import JobStore
from cola_runtime.proto import control_pb2
from cola_runtime.scheduler.leases import LeaseBook, LeaseLost
from cola_runtime.server.keys import create_key
from cola_runtime.server.limits import Limits
from cola_runtime.server.operators import OperatorDesk
from cola_runtime.spec import JobSpec
from cola_runtime.trace.spans import SpanRecorder
from cola_runtime.transport.control import spec_from_proto
from cola_runtime.transport.endpoints import GRADIENTS, serve_streams
from cola_runtime.transport.frames import MAX_PAYLOAD_BYTES, control_frame
from cola_runtime.transport.stream import FrameStream
from cola_runtime.types import LearningRateSchedule, Lease, OptimizerHyperparameters

LION = OptimizerHyperparameters(kind="lion", learning_rate=0.1)
LEASE = Lease(job_id="job-" + "0" * 32, epoch=1, device_id="d1")


def _folder_that_is_taken(path: Path) -> None:
    (path / "there").mkdir()
    (path / "there" / "file").touch()
    with new_folder(path / "there"):
        pass


def _folder_in_a_file(path: Path) -> None:
    (path / "file").touch()
    with new_folder(path / "file" / "there"):
        pass


def _job_file(path: Path, text: str) -> None:
    (path / "job.yaml").write_text(text)
    read_job_file(path / "job.yaml")


def _unknown_schedule() -> float:
    schedule = LearningRateSchedule(kind="staircase", warmup_steps=0, total_steps=3)
    return learning_rate(schedule, 1.0, 1)


def _too_much_credit() -> None:
    sent = SentTaps(SpanRecorder(), "d1")
    link = DeviceLink(None, device_id="d1", credit_bytes=1, on_parked=print, sent=sent)  # type: ignore[arg-type]
    link.return_credit(1)


REFUSALS: dict[str, Callable[[Path], object]] = {
    "PATH_EXISTS": _folder_that_is_taken,
    "PATH_NOT_WRITABLE": _folder_in_a_file,
    "FILE_NAME": lambda path: NewFolder(path).append("../x", b""),
    "DATASET_ROW": lambda _: upload_of([{"prompt": math.nan}], name="training"),
    "JOB_FILE_UNREADABLE": lambda path: read_job_file(path / "none.yaml"),
    "JOB_FILE_YAML": lambda path: _job_file(path, "a: [1"),
    "JOB_FILE_INVALID": lambda path: _job_file(path, "name: chat\ntraining: 7\n"),
    "KEY_INVALID": lambda _: call_metadata(ClientSettings.model_validate({"api_key": "tml-\x00"})),
    "JOIN_TOKEN_MISSING": lambda _: device_config(JoinSettings()),
    "STORE_MISSING": lambda path: _in_store(path, lambda store: store.keys()),
    "CONTROL_TOO_LARGE": lambda _: control_frame(bytes(MAX_PAYLOAD_BYTES + 1)),
    "ADAPTER_INVALID": lambda _: spec_from_proto(control_pb2.AdapterDefinition(spec_json="{}")),
    "SCHEDULE_UNKNOWN": lambda _: _unknown_schedule(),
    "CREDIT_INVALID": lambda _: _too_much_credit(),
    "OPTIMIZER_UNKNOWN": lambda _: build_optimizer(LION, cast(FlatLayout, None), torch.ones(1)),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_it_is_refused_with_its_reason(reason: str, tmp_path: Path) -> None:
    with pytest.raises(ColaError) as caught:
        REFUSALS[reason](tmp_path)
    assert caught.value.reason == reason


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[JobStore]:
    opened = await JobStore.open(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    yield opened
    await opened.close()


async def test_what_an_operator_may_not_ask_for_has_its_reason(store: JobStore) -> None:
    desk = OperatorDesk(store, Limits())
    heavy = TermChanges(weight=-1.0)
    for reason, asking in {
        "SCOPE_UNKNOWN": create_key(store, "acme", ["jobs:fly"]),
        "TERMS_INVALID": create_key(store, "acme", changes=heavy),
        "TENANT_NAME_INVALID": store.create_tenant("\x1b"),
        "TENANT_UNKNOWN": store.create_key("nobody"),
        "SCOPES_INVALID": store.create_key("acme", scopes=["a b"]),
        "DEVICE_NOT_REGISTERED": desk.revoke("nobody"),
        "TLS_OFF": desk.join("join-guess", "d1", b""),
    }.items():
        with pytest.raises(ColaError) as caught:
            await asking
        assert caught.value.reason == reason


async def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    async def nobody(_: FrameStream[Any]) -> None:
        raise AssertionError

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ColaError) as caught:
        await serve_streams(f"127.0.0.1:{taken.getsockname()[1]}", {GRADIENTS: nobody})
    assert caught.value.reason == "PORT_IN_USE"


class _Broken:
    """A pipe whose other end is gone."""

    async def read(self) -> Any:
        raise asyncio.InvalidStateError("gone")

    async def write(self, message: bytes) -> None:
        raise AssertionError(message)


async def test_a_stream_that_is_lost_or_closed_says_which() -> None:
    stream: FrameStream[Any] = FrameStream(_Broken(), control_pb2.GradientControl, peer="d1")
    with pytest.raises(ColaError) as lost:
        await stream.receive()
    await stream.close()
    with pytest.raises(ColaError) as closed:
        await stream.send_control(control_pb2.GradientControl())
    assert (lost.value.reason, closed.value.reason) == ("STREAM_LOST", "STREAM_CLOSED")


async def test_a_wait_on_a_lease_ends_with_it_or_in_time() -> None:
    book = LeaseBook()
    with pytest.raises(LeaseLost) as ended:
        book.check(LEASE)
    book.open(LEASE, replica="tiny/0")
    with pytest.raises(LeaseLost) as late:
        await book.wait_version(LEASE, 1, timeout_seconds=0.01)
    assert (ended.value.reason, late.value.reason) == ("LEASE_ENDED", "LEASE_TIMEOUT")


def test_dropout_cannot_be_merged_and_a_site_has_one_part() -> None:
    fields = {"name": "chat", "base_model": "tiny-llama"}
    merged = {**fields, "mode": "merged", "adapter": {"kind": "lora", "dropout": 0.5}}
    twice = {**fields, "adapter": [{"kind": "lora"}, {"kind": "linear", "target_modules": ["q_proj"]}]}
    for reason, spec in {"MERGED_DROPOUT": merged, "SITE_TWICE": twice}.items():
        with pytest.raises(ColaError) as caught:
            training_plan(JobSpec.model_validate(spec), description(Path()), total_steps=1)
        assert caught.value.reason == reason
