"""What a device once sent, recorded on the way and sent again by somebody else: at once, and later.

Without TLS, which is on loopback only, whoever reads a stream has the device's ticket and join token; so what
counts is that nothing of a recording is applied a second time. With TLS a recording opens no stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.config import DeviceSettings
from cola_runtime.errors import ColaError, ProtocolError, Unauthenticated
from cola_runtime.proto import control_pb2
from cola_runtime.testing.chaos import Chaos, Recorder
from cola_runtime.testing.chaos_proxy import SILENCE_SECONDS, byte_proxy, frame_proxy, play_bytes
from cola_runtime.testing.exactness import service_for
from cola_runtime.transport import handshake
from cola_runtime.transport.endpoints import DEVICES, GRADIENTS, StreamMethod, connect
from cola_runtime.transport.frames import HEADER_BYTES, FrameKind, decode_header
from cola_runtime.transport.reader import FrameLimits
from cola_runtime.transport.stream import ReceivedControl
from tests.faults.judging import MODEL, WAIT_SECONDS, Accept, Faultless, fault_job, judge
from tests.faults.processes import reach
from tests.faults.proxied import Proxy, client_of, harmed_service, tls_settings

HELLO_SECONDS = 10.0
HANDSHAKE = b"\x16"  # the type of a TLS record
OF_AN_OLD_STEP = {"STEP_OUT_OF_ORDER", "FENCED", "LEASE_UNKNOWN"}


async def play_frames(endpoint: str, method: StreamMethod, frames: Sequence[bytes]) -> list[Any]:
    """What the server answers, in order. Raises what it ends the stream with."""
    stream = await connect(endpoint, method)
    try:
        stream.accept_tensors(FrameLimits(packs=True))
        hello, *rest = frames
        await stream.send_frames([(hello,)])
        answers = [item.message for item in [await stream.receive_one(timeout_seconds=HELLO_SECONDS)]]
        await stream.send_frames([(frame,) for frame in rest])
        while True:
            try:
                items = await stream.receive(timeout_seconds=SILENCE_SECONDS)
            except ColaError as error:
                if error.reason == "STREAM_SILENT":
                    return answers
                raise
            answers += [item.message for item in items if isinstance(item, ReceivedControl)]
            if not items:
                return answers
    finally:
        await stream.close()


def refusals(answers: Sequence[Any]) -> list[str]:
    return [each.refusal.reason for each in answers if each.WhichOneof("message") == "refusal"]


def without_credits(frames: Sequence[bytes]) -> list[bytes]:
    """The hello, the weights and their ends: what a forger would leave in."""
    return [frame for frame in frames if not _is_credit(frame)]


def _is_credit(frame: bytes) -> bool:
    if decode_header(frame, 0).kind != FrameKind.CONTROL:
        return False
    message = control_pb2.GradientControl.FromString(frame[HEADER_BYTES:])
    return message.WhichOneof("message") == "credit"


async def all_of(handle: AsyncJobHandle) -> tuple[Any, ...]:
    """Everything that the service says of an ended job."""
    return (
        await handle.refresh(),
        await handle.metrics(),
        await handle.checkpoints(),
        [event async for event in handle.events(follow=False)],
    )


def settings_of(folder: Path, model: Path, **changes: Any) -> Any:
    devices = DeviceSettings(count=1, heartbeat_seconds=0.5, lease_timeout_seconds=3.0, **changes)
    return service_for(folder, model=model, name=MODEL, dtype="float32").model_copy(
        update={"devices": devices}
    )


class Tapped:
    """Both links of the service's one device, recorded."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self.recorders = {"base model": Recorder(), "coordinator": Recorder()}
        self.endpoints: dict[str, str] = {}  # the real ones

    def links(self) -> dict[str, tuple[Proxy, Chaos]]:
        return {name: (partial(self._open, name), recorder) for name, recorder in self.recorders.items()}

    def sent(self, link: str) -> list[bytes]:
        return list(self.recorders[link].sent)

    async def play_all(self) -> list[bytes]:
        """What each server answers to the bytes so far of its link, both played at the same time."""
        return await asyncio.gather(
            *(play_bytes(self.endpoints[link], self.sent(link)) for link in self.recorders)
        )

    def _open(self, link: str, upstream: str, chaos: Chaos) -> AbstractAsyncContextManager[str]:
        self.endpoints[link] = upstream
        return self._proxy(upstream, chaos)


@pytest.mark.quick
async def test_recorded_frames_are_refused_by_name_and_nothing_is_applied_again(
    model: Path, tmp_path: Path, faultless: Faultless, accept: Accept, monkeypatch: pytest.MonkeyPatch
) -> None:
    tapped = Tapped(frame_proxy)
    async with (
        harmed_service(settings_of(tmp_path, model), tapped.links()) as service,
        client_of(service, ca=None) as client,
    ):
        base, coordinator = tapped.endpoints["base model"], tapped.endpoints["coordinator"]
        handle = await client.submit(fault_job().spec, training=fault_job().training)
        await reach(handle, 4)
        moment, updates = time.time(), without_credits(tapped.sent("base model"))
        of_control = tapped.sent("coordinator")
        told = refusals(await play_frames(base, GRADIENTS, updates))
        assert told and set(told) <= OF_AN_OLD_STEP, told
        await play_frames(coordinator, DEVICES, of_control)
        await handle.wait(WAIT_SECONDS)
        accept(
            await judge(handle, faultless, part="stream", case="replay", faults=[moment], data_dir=tmp_path)
        )
        before = await all_of(handle)
        assert set(refusals(await play_frames(base, GRADIENTS, updates))) == {"LEASE_UNKNOWN"}
        with pytest.raises(ProtocolError) as caught:
            await play_frames(base, GRADIENTS, tapped.sent("base model"))
        assert caught.value.reason == "CREDIT_INVALID"
        welcome, *_ = await play_frames(coordinator, DEVICES, of_control)
        assert welcome.WhichOneof("message") == "welcome"
        late = SimpleNamespace(time=lambda: time.time() + handshake.TICKET_SECONDS)
        monkeypatch.setattr(handshake, "time", late)
        with pytest.raises(Unauthenticated) as refused:
            await play_frames(base, GRADIENTS, updates)
        assert refused.value.reason == "TICKET_WRONG"
        assert await all_of(handle) == before


async def test_recorded_bytes_change_nothing(
    model: Path, tmp_path: Path, faultless: Faultless, accept: Accept
) -> None:
    tapped = Tapped(byte_proxy)
    async with (
        harmed_service(settings_of(tmp_path, model), tapped.links()) as service,
        client_of(service, ca=None) as client,
    ):
        handle = await client.submit(fault_job().spec, training=fault_job().training)
        await reach(handle, 4)
        moment = time.time()
        assert all(await tapped.play_all())  # with an answer: to the server these are calls
        await handle.wait(WAIT_SECONDS)
        accept(
            await judge(
                handle, faultless, part="stream", case="replay of bytes", faults=[moment], data_dir=tmp_path
            )
        )
        before = await all_of(handle)
        assert all(await tapped.play_all())
        assert await all_of(handle) == before


async def test_recorded_bytes_of_tls_open_no_stream(
    model: Path, tmp_path: Path, faultless: Faultless, accept: Accept
) -> None:
    tapped = Tapped(byte_proxy)
    settings = settings_of(tmp_path, model, listen="127.0.0.1:0").model_copy(
        update={"tls": tls_settings(tmp_path)}
    )
    async with (
        harmed_service(settings, tapped.links()) as service,
        client_of(service, ca=tmp_path / "ca.pem") as client,
    ):
        handle = await client.submit(fault_job().spec, training=fault_job().training)
        await reach(handle, 4)
        moment = time.time()
        answers = await tapped.play_all()
        await handle.wait(WAIT_SECONDS)
        answers += await tapped.play_all()
        assert all(answer[:1] in (HANDSHAKE, b"") for answer in answers)
        joined = [entry for entry in await service.store.audit.entries() if entry.kind == "device.joined"]
        outcome = await judge(
            handle, faultless, part="stream", case="replay of TLS", faults=[moment], data_dir=tmp_path
        )
        accept(outcome)
    assert (len(joined), outcome.leases, outcome.steps_made_again) == (1, 1, 0)
