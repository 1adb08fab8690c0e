"""A device that was let in and means no good: over a real stream to the coordinator's pool."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import math
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from cola_runtime.config import DeviceSettings
from cola_runtime.errors import ColaError, ProtocolError, Unauthenticated
from cola_runtime.job_choices import TrustClass
from cola_runtime.jobs.store import JobStore
from cola_runtime.proto import control_pb2
from cola_runtime.scheduler.device_gate import DeviceGate
from cola_runtime.scheduler.device_pool import DevicePool
from cola_runtime.scheduler.leases import LeaseBook, LeaseLost
from cola_runtime.scheduler.quarantine import STRIKES, QuarantineDesk
from cola_runtime.transport.control import lease_to_proto
from cola_runtime.transport.endpoints import DEVICES, Connection, connect, serve_streams
from cola_runtime.transport.frames import (
    PROTOCOL_VERSION,
    DType,
    TensorAddress,
    WireTensor,
    control_frame,
)
from cola_runtime.transport.handshake import introduce
from cola_runtime.transport.reader import FrameLimits, ReceivedTensor
from cola_runtime.types import Lease, TensorKind

OWN = Lease(job_id="job-" + "0a" * 16, epoch=2, device_id="evil")
ANOTHERS = Lease(job_id="job-" + "0b" * 16, epoch=1, device_id="good")
SECONDS = 10.0


class Bench:
    """A pool, two open leases, and the stream of the device `evil`."""

    def __init__(self, book: LeaseBook, pool: DevicePool, store: JobStore, endpoint: str) -> None:
        self.book, self.pool, self.store = book, pool, store
        self._endpoint = endpoint
        self.stream: Connection[Any]
        self.stored: list[tuple[Lease, int, bytes]] = []

    async def dial(self, *, token: str = "secret", **said: Any) -> None:
        self.stream = await connect(self._endpoint, DEVICES)
        hello = control_pb2.DeviceHello(
            device_id="evil", join_token=token, protocol_version=PROTOCOL_VERSION, **said
        )
        await introduce(self.stream, control_pb2.DeviceControl(hello=hello), limits=FrameLimits())

    async def keep(self, lease: Lease, version: int, content: bytes, _digest: str) -> None:
        self.stored.append((lease, version, content))

    async def send(self, **message: Any) -> None:
        await self.stream.send_control(control_pb2.DeviceControl(**message))

    async def blob(self, lease: Lease, content: bytes) -> None:
        address = TensorAddress(job_id=lease.job_id, epoch=lease.epoch, version=0, kind=TensorKind.BLOB)
        data = WireTensor(dtype=DType.UINT8, shape=(len(content),), data=memoryview(content))
        await self.stream.send_tensor(address, data)

    async def made(self, lease: Lease, content: bytes, *, digest: str = "") -> None:
        sha256 = digest or hashlib.sha256(content).hexdigest()
        made = control_pb2.CheckpointMade(
            lease=lease_to_proto(lease), version=1, bytes=len(content), sha256=sha256
        )
        await self.send(checkpoint_made=made)

    async def put_out(self) -> ColaError:
        """What the pool ends the stream with."""
        try:
            while await self.stream.receive(timeout_seconds=SECONDS):
                pass
        except ColaError as error:
            return error
        raise AssertionError("the stream ended without an error")

    async def still_in(self) -> None:
        """The pool answers the drain of a device that it knows, so all before was taken."""
        await self.send(lease_failed=control_pb2.LeaseFailed(lease=lease_to_proto(OWN), reason="DRAINING"))
        with pytest.raises(LeaseLost) as lost:
            await self.book.wait_version(OWN, 9, timeout_seconds=SECONDS)
        assert lost.value.reason == "DRAINING"


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    store = await JobStore.open(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    book = LeaseBook()
    pool = DevicePool(
        DeviceSettings(heartbeat_seconds=0.1),
        gate=DeviceGate(store.devices, join_token="secret"),
        audit=store.audit,
        book=book,
    )
    server, endpoint = await serve_streams("127.0.0.1:0", {DEVICES: pool.on_stream})
    bench = Bench(book, pool, store, endpoint)
    await bench.dial()
    pool.on_checkpoint = bench.keep
    for lease in (OWN, ANOTHERS):
        book.open(lease, replica="tiny/0")
    yield bench
    await bench.stream.close()
    await server.stop(0)
    await store.close()


async def test_three_damaged_frames_put_a_device_in_quarantine(bench: Bench) -> None:
    desk = QuarantineDesk(pool=bench.pool, book=bench.book, store=bench.store)
    bench.pool.on_fault = desk.strike
    for strike in range(STRIKES):
        if strike:
            await bench.dial()
        beat = control_pb2.DeviceControl(heartbeat=control_pb2.Heartbeat(busy_seconds=1.0))
        frame = bytearray(b"".join(control_frame(beat.SerializeToString())))
        frame[-1] ^= 1
        await bench.stream.send_frames([(bytes(frame),)])
        assert (await bench.put_out()).reason == "FRAME_CHECKSUM"
    async with asyncio.timeout(SECONDS):
        while not await bench.store.devices.quarantines():  # noqa: ASYNC110 (a table has no event)
            await asyncio.sleep(0.01)
    (quarantine,) = await bench.store.devices.quarantines()
    assert (quarantine.device_id, quarantine.reason) == ("evil", "FRAME_CHECKSUM")
    with pytest.raises(Unauthenticated) as refused:
        await bench.dial()
    assert refused.value.reason == "DEVICE_QUARANTINED"


async def test_faults_that_a_sound_device_has_too_are_no_strikes(bench: Bench) -> None:
    desk = QuarantineDesk(pool=bench.pool, book=bench.book, store=bench.store)
    for _ in range(10):
        desk.strike("evil", "CONTROL_INVALID")
        desk.strike("evil", "")
    for device in ("one", "other"):
        for _ in range(STRIKES - 1):
            desk.strike(device, "FRAME_CHECKSUM")
    assert not desk._tasks


async def test_a_device_whose_place_somebody_took_gets_it_back_when_that_one_leaves(bench: Bench) -> None:
    own = bench.stream
    await bench.dial()  # with the same hello
    await bench.stream.close()
    beat = control_pb2.DeviceControl(heartbeat=control_pb2.Heartbeat(busy_seconds=1.0))
    async with asyncio.timeout(SECONDS):
        while bench.pool.statuses():  # noqa: ASYNC110 (the pool tells nobody)
            await asyncio.sleep(0.01)
    await own.send_control(beat)
    while await own.receive(timeout_seconds=SECONDS):
        pass  # until the pool ends the stream, at which a device dials in again
    await own.close()


async def test_a_device_whose_join_token_ends_is_put_out(bench: Bench) -> None:
    token, _ = await bench.store.devices.create_token(
        TrustClass.COMMUNITY, reusable=False, valid=timedelta(seconds=0.5), created_by="key-1"
    )
    ended: list[str] = []

    async def dismissed(device_id: str) -> None:
        ended.append(device_id)

    bench.pool.on_dismissed = dismissed
    await bench.stream.close()
    await bench.dial(token=token)
    watching = asyncio.create_task(bench.pool.watch_forever())
    while await bench.stream.receive(timeout_seconds=SECONDS):
        pass
    watching.cancel()
    assert ended == ["evil"], "at the base model, too"
    assert bench.pool.trust("evil") is None


@pytest.mark.parametrize("busy", [math.nan, math.inf, -1.0])
async def test_a_heartbeat_that_is_no_time_puts_it_out(bench: Bench, busy: float) -> None:
    await bench.send(heartbeat=control_pb2.Heartbeat(busy_seconds=busy))
    error = await bench.put_out()
    assert (type(error), error.reason) == (ProtocolError, "CONTROL_INVALID")


@pytest.mark.parametrize("speed", [math.nan, math.inf, -1.0])
async def test_a_speed_that_no_device_has_is_not_let_in(bench: Bench, speed: float) -> None:
    await bench.stream.close()
    with pytest.raises(ProtocolError) as caught:
        await bench.dial(numbers_per_second=speed)
    assert caught.value.reason == "CONTROL_INVALID"


async def test_what_only_a_coordinator_sends_puts_it_out(bench: Bench) -> None:
    await bench.send(lease_end=control_pb2.LeaseEnd(lease=lease_to_proto(OWN)))
    assert (await bench.put_out()).reason == "CONTROL_UNEXPECTED"


async def test_it_cannot_end_another_devices_lease_nor_an_older_one_of_its_own(bench: Bench) -> None:
    older = Lease(job_id=OWN.job_id, epoch=1, device_id="evil")
    posing = Lease(job_id=ANOTHERS.job_id, epoch=1, device_id="evil")
    for lease in (ANOTHERS, posing, older):
        failed = control_pb2.LeaseFailed(lease=lease_to_proto(lease), reason="LEASE_UNKNOWN", message="gone")
        await bench.send(lease_failed=failed)
    await bench.still_in()
    bench.book.check(ANOTHERS)


async def test_what_it_says_of_its_lease_is_bounded(bench: Bench) -> None:
    failed = control_pb2.LeaseFailed(lease=lease_to_proto(OWN), reason="\x1b[31m", message="x" * 10_000)
    await bench.send(lease_failed=failed)
    with pytest.raises(LeaseLost) as lost:
        await bench.book.wait_version(OWN, 9, timeout_seconds=SECONDS)
    assert (lost.value.reason, len(lost.value.message)) == ("DEVICE_REFUSED", 500)


async def test_checkpoints_of_what_it_does_not_hold_are_neither_kept_nor_stored(bench: Bench) -> None:
    content = b"weights"
    for number in range(50):
        foreign = Lease(job_id=f"job-{number:032x}", epoch=1, device_id="evil")
        await bench.blob(foreign, content)
        await bench.made(foreign, content)
        await bench.blob(foreign, content)  # of which nothing more is said
    await bench.blob(ANOTHERS, content)
    await bench.made(ANOTHERS, content)
    await bench.blob(OWN, content)
    await bench.made(OWN, content)
    await bench.still_in()
    assert bench.stored == [(OWN, 1, content)]
    await bench.send(drain=control_pb2.Drain())
    async with asyncio.timeout(SECONDS):
        while not bench.pool.draining("evil"):  # noqa: ASYNC110 (whatever came with the drain is not kept)
            await asyncio.sleep(0.01)
    kept = [each for each in gc.get_objects() if type(each) is ReceivedTensor]
    assert not [each.address for each in kept if each.address.job_id != OWN.job_id]


@pytest.mark.parametrize(
    ("sent", "said", "digest", "reason"),
    [
        (b"weights", b"weights", "0" * 64, "CHECKPOINT_CORRUPT"),
        (b"weight", b"weights", "", "CHECKPOINT_INCOMPLETE"),
        (None, b"weights", "", "CHECKPOINT_INCOMPLETE"),
    ],
)
async def test_a_checkpoint_that_is_not_what_it_says_puts_it_out(
    bench: Bench, sent: bytes | None, said: bytes, digest: str, reason: str
) -> None:
    if sent is not None:
        await bench.blob(OWN, sent)
    await bench.made(OWN, said, digest=digest)
    assert (await bench.put_out()).reason == reason
    assert bench.stored == []
