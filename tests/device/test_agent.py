"""A real device agent against a real gradient server over loopback gRPC, with a small coordinator."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from cola_runtime.adapter_spec import LeaseTerms
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.adapters.checkpoint_format import TrainingDefinition
from cola_runtime.adapters.flat_layout import FlatLayout
from cola_runtime.base_model.gradient_server import GradientServer
from cola_runtime.base_model.updates import Update
from cola_runtime.device.agent import DeviceAgent
from cola_runtime.device.config import DeviceConfig
from cola_runtime.device.session import AdapterSession
from cola_runtime.errors import Fenced, Unauthenticated
from cola_runtime.proto import control_pb2
from cola_runtime.transport import control
from cola_runtime.transport.endpoints import GRADIENTS, connect
from cola_runtime.transport.frames import PROTOCOL_VERSION, TensorAddress
from cola_runtime.transport.handshake import gradient_ticket, introduce
from cola_runtime.transport.reader import FrameLimits
from cola_runtime.transport.tensors import to_wire
from cola_runtime.types import (
    BaseEvent,
    DeviceLinkChanged,
    Lease,
    Segment,
    Site,
    SiteKind,
    StepRefused,
    TensorKey,
    TensorKind,
)
from tests.device.adapter_samples import definition, gradients
from tests.device.fake_coordinator import TOKEN, WAIT_SECONDS, FakeCoordinator
from tests.device.reference_training import train_alone

JOBS = ("job-" + "0a" * 16, "job-" + "0b" * 16)


class Fabric:
    """A base end, a coordinator and any number of devices in one event loop."""

    def __init__(self) -> None:
        self.events: list[BaseEvent] = []
        self.updates: list[Update] = []
        self.server = GradientServer(
            join_token=TOKEN, on_update=self._note(self.updates), on_event=self._note(self.events)
        )
        self.coordinator = FakeCoordinator("")
        self.endpoint = ""
        self._changed = asyncio.Event()
        self._devices: list[tuple[DeviceAgent, asyncio.Task[None]]] = []

    def _note(self, kept: list[Any]) -> Callable[[Any], None]:
        def note(item: Any) -> None:
            kept.append(item)
            self._changed.set()

        return note

    async def start(self) -> None:
        self.coordinator.gradient_endpoint = await self.server.start("127.0.0.1:0")
        self.endpoint = await self.coordinator.start()

    async def stop(self) -> None:
        for agent, task in self._devices:
            agent.stop()
            await asyncio.wait_for(task, WAIT_SECONDS)
        await self.coordinator.stop()
        await self.server.stop()

    async def device(self, name: str = "d1", **changes: Any) -> asyncio.Task[None]:
        config = DeviceConfig(
            device_id=name,
            coordinator_endpoint=self.endpoint,
            join_token=TOKEN,
            first_retry_seconds=0.02,
            **changes,
        )
        agent = DeviceAgent(config)
        task = asyncio.create_task(agent.run())
        self._devices.append((agent, task))
        await self.coordinator.until(lambda: name in self.coordinator.streams)
        return task

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def update(self, lease: Lease, version: int) -> Update:
        def found() -> list[Update]:
            return [u for u in self.updates if u.lease == lease and u.version == version]

        await self.until(lambda: bool(found()))
        return found()[-1]

    async def refused(self, reason: str) -> StepRefused:
        def found() -> list[StepRefused]:
            return [e for e in self.events if isinstance(e, StepRefused) and e.reason == reason]

        await self.until(lambda: bool(found()))
        return found()[0]

    async def grant(self, lease: Lease, training: TrainingDefinition, **how: Any) -> Update:
        self.server.lease(lease, LeaseTerms(spec=training.spec))
        await self.coordinator.grant(lease, training, **how)
        await self.until(lambda: any(update.lease == lease for update in self.updates))
        return next(update for update in self.updates if update.lease == lease)

    async def send(
        self,
        lease: Lease,
        version: int,
        tensors: Mapping[TensorKey, Tensor],
        *,
        microbatch: int = 0,
        last: bool = True,
        announced: int | None = None,
        staleness: int = 0,
    ) -> None:
        """What the base model does for one segment, from another thread as there."""
        segment = Segment(
            lease=lease,
            version=version,
            rows=(),
            loss_denominator=1.0,
            microbatch=microbatch,
            last_microbatch=last,
            staleness=staleness,
        )
        sent: Counter[int] = await asyncio.to_thread(self.server.send_tap, segment, tensors)
        self.server.end_microbatch(segment, sent if announced is None else {0: announced})

    async def step(self, lease: Lease, version: int, training: TrainingDefinition) -> Update:
        """Two microbatches of one step; returns the update that comes back."""
        for part in range(2):
            tensors = gradients(training, 100 * version + part)
            await self.send(lease, version, tensors, microbatch=part, last=part == 1)
        return await self.update(lease, version + 1)


@pytest.fixture
async def fabric() -> AsyncIterator[Fabric]:
    torch.set_num_threads(1)
    fabric = Fabric()
    await fabric.start()
    yield fabric
    await fabric.stop()


def lease_of(job: int = 0, *, epoch: int = 1, device: str = "d1") -> Lease:
    return Lease(job_id=JOBS[job], epoch=epoch, device_id=device)


def reference(training: TrainingDefinition, steps: int) -> dict[TensorKey, Tensor]:
    return train_alone(training, [[gradients(training, 100 * s + p) for p in range(2)] for s in range(steps)])


def assert_same(left: Mapping[TensorKey, Tensor], right: Mapping[TensorKey, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


async def test_a_grant_brings_the_start_weights_to_the_base_model(fabric: Fabric) -> None:
    await fabric.device()
    update = await fabric.grant(lease_of(), definition())
    assert update.version == 0
    assert_same(update.weights, initial_weights(definition().spec))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
async def test_steps_over_the_wire_are_bitwise_torch_optim(fabric: Fabric, kind: str) -> None:
    training = definition(kind=kind)
    await fabric.device()
    await fabric.grant(lease_of(), training)
    for version in range(6):
        update = await fabric.step(lease_of(), version, training)
    assert_same(update.weights, reference(training, 6))
    assert update.learning_rate > 0
    assert update.gradient_norm > 0
    assert update.device_seconds > 0


async def test_bytes_are_counted_per_step_with_headers(fabric: Fabric) -> None:
    training = definition()
    await fabric.device()
    start = await fabric.grant(lease_of(), training)
    update = await fabric.step(lease_of(), 0, training)
    payload = sum(tensor.nbytes for tensor in update.weights.values())
    tensors = len(update.weights)
    assert start.bytes_up == 0
    assert start.bytes_down >= payload + 2 * 88  # the weights as one tensor, and their end
    up = 2 * (payload + 24 * tensors + 2 * 88)  # of each microbatch one pack, and its end
    assert up <= update.bytes_up <= up + 2 * 200
    assert payload + 2 * 88 <= update.bytes_down <= payload + 2 * 88 + 200


async def test_two_jobs_on_two_devices_do_not_touch_each_other(fabric: Fabric) -> None:
    trainings = (definition(rank=2), definition(kind="sgd", rank=4))
    leases = (lease_of(0, device="d1"), lease_of(1, device="d2"))
    await fabric.device("d1")
    await fabric.device("d2")
    for lease, training in zip(leases, trainings, strict=True):
        await fabric.grant(lease, training)
    for version in range(3):
        pairs = zip(leases, trainings, strict=True)
        updates = await asyncio.gather(*(fabric.step(lease, version, training) for lease, training in pairs))
    for update, training in zip(updates, trainings, strict=True):
        assert_same(update.weights, reference(training, 3))


async def test_an_absent_tenant_gets_no_step_and_no_decay(fabric: Fabric) -> None:
    """Trap 5: two adapters on one device, of which one has no rows while the other makes three steps."""
    present, absent = (lease_of(number) for number in range(2))
    training = definition()
    await fabric.device()
    for lease in (present, absent):
        await fabric.grant(lease, training)
    for version in range(3):
        busy = await fabric.step(present, version, training)
    waited = await fabric.step(absent, 0, training)
    assert_same(busy.weights, reference(training, 3))
    assert_same(waited.weights, reference(training, 1))


async def test_checkpoints_come_on_schedule_and_at_the_last_step(fabric: Fabric) -> None:
    training = definition(total_steps=3)
    await fabric.device()
    await fabric.grant(lease_of(), training, every=2)
    versions = []
    for version in range(3):
        await fabric.step(lease_of(), version, training)
        if version > 0:
            await fabric.coordinator.until(
                lambda v=version: fabric.coordinator.checkpoints.get(JOBS[0], (0, b""))[0] == v + 1
            )
            versions.append(fabric.coordinator.checkpoints[JOBS[0]][0])
    assert versions == [2, 3]


async def test_a_job_restored_on_another_device_continues_bit_for_bit(fabric: Fabric) -> None:
    training = definition()
    first = await fabric.device("d1")
    await fabric.grant(lease_of(), training, every=3)
    for version in range(4):
        await fabric.step(lease_of(), version, training)
    await fabric.coordinator.until(lambda: JOBS[0] in fabric.coordinator.checkpoints)
    first.cancel()
    await fabric.until(
        lambda: fabric.events[-1] == DeviceLinkChanged(device_id="d1", connected=False, parked=False)
    )
    fabric._devices.clear()

    version, checkpoint = fabric.coordinator.checkpoints[JOBS[0]]
    lease = lease_of(epoch=2, device="d2")
    await fabric.device("d2")
    update = await fabric.grant(lease, training, checkpoint=checkpoint)
    assert (version, update.version) == (3, 3)
    for version in range(3, 6):
        update = await fabric.step(lease, version, training)
    assert_same(update.weights, reference(training, 6))


async def test_a_killed_device_process_is_noticed_and_another_one_takes_over(fabric: Fabric) -> None:
    training = definition()
    program = (
        "import asyncio, sys\n"
        "from cola_runtime.device.agent import DeviceAgent\n"
        "from cola_runtime.device.config import DeviceConfig\n"
        "async def main():\n"
        "    await DeviceAgent(DeviceConfig(device_id='d1', coordinator_endpoint=sys.argv[1],"
        " join_token=sys.argv[2])).run()\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, fabric.endpoint, TOKEN)
    try:
        await fabric.coordinator.until(lambda: "d1" in fabric.coordinator.streams)
        await fabric.grant(lease_of(epoch=1), training)
        await fabric.step(lease_of(epoch=1), 0, training)
        await fabric.send(lease_of(epoch=1), 1, gradients(training, 9), last=False)
    finally:
        process.kill()
        await process.wait()
    gone = DeviceLinkChanged(device_id="d1", connected=False, parked=False)
    await fabric.until(lambda: gone in fabric.events)
    await fabric.device("d2")
    lease = lease_of(epoch=2, device="d2")
    await fabric.grant(lease, training)
    for version in range(2):
        update = await fabric.step(lease, version, training)
    assert_same(update.weights, reference(training, 2))


async def test_a_checkpoint_can_be_asked_for(fabric: Fabric) -> None:
    await fabric.device()
    await fabric.grant(lease_of(), definition())
    request = control_pb2.CheckpointRequest(lease=control.lease_to_proto(lease_of()))
    await fabric.coordinator.send("d1", checkpoint_request=request)
    await fabric.coordinator.until(lambda: JOBS[0] in fabric.coordinator.checkpoints)
    version, data = fabric.coordinator.checkpoints[JOBS[0]]
    assert version == 0
    assert AdapterSession.restore(data).definition == definition()


async def test_taps_of_another_version_are_refused_and_not_applied(fabric: Fabric) -> None:
    training = definition()
    await fabric.device()
    await fabric.grant(lease_of(), training)
    await fabric.send(lease_of(), 1, gradients(training, 0))
    refused = await fabric.refused("VERSION_MISMATCH")
    assert refused.lease == lease_of()
    assert {update.version for update in fabric.updates} == {0}


async def test_a_lost_tensor_or_microbatch_is_noticed_before_the_step(fabric: Fabric) -> None:
    training = definition()
    await fabric.device()
    for job, how in enumerate(({"announced": 7}, {"microbatch": 1})):
        await fabric.grant(lease_of(job), training)
        await fabric.send(lease_of(job), 0, gradients(training, 0), **how)  # type: ignore[arg-type]
        await fabric.until(
            lambda j=job: any(isinstance(e, StepRefused) and e.lease == lease_of(j) for e in fabric.events)
        )
    assert {e.reason for e in fabric.events if isinstance(e, StepRefused)} == {"MICROBATCH_INCOMPLETE"}
    assert {update.version for update in fabric.updates} == {0}


async def test_a_non_finite_gradient_is_refused_and_the_neighbour_goes_on(fabric: Fabric) -> None:
    training = definition()
    await fabric.device()
    await fabric.grant(lease_of(0), training)
    await fabric.grant(lease_of(1), training)
    poisoned = {key: tensor * float("nan") for key, tensor in gradients(training, 0).items()}
    await fabric.send(lease_of(0), 0, poisoned)
    refused = await fabric.refused("NON_FINITE_GRADIENT")
    assert refused.lease == lease_of(0)
    update = await fabric.step(lease_of(1), 0, training)
    assert_same(update.weights, reference(training, 1))


async def test_taps_of_an_older_epoch_are_ignored(fabric: Fabric) -> None:
    training = definition()
    await fabric.device()
    await fabric.grant(lease_of(epoch=1), training)
    await fabric.grant(lease_of(epoch=2), training)
    await fabric.send(lease_of(epoch=1), 0, gradients(training, 0))
    await fabric.step(lease_of(epoch=2), 0, training)
    assert {(u.lease.epoch, u.version) for u in fabric.updates} == {(1, 0), (2, 0), (2, 1)}


async def test_a_grant_with_an_older_epoch_fails(fabric: Fabric) -> None:
    training = definition()
    await fabric.device()
    await fabric.grant(lease_of(epoch=2), training)
    with pytest.raises(Fenced):
        fabric.server.lease(lease_of(epoch=1), LeaseTerms(spec=training.spec))
    await fabric.coordinator.grant(lease_of(epoch=1), training)
    await fabric.coordinator.until(lambda: bool(fabric.coordinator.failures))
    assert fabric.coordinator.failures[0].reason == "FENCED"
    await fabric.step(lease_of(epoch=2), 0, training)


async def test_a_wrong_or_foreign_checkpoint_fails_the_grant(fabric: Fabric) -> None:
    await fabric.device()
    other = AdapterSession.create(definition(rank=5)).checkpoint()
    for job, (checkpoint, reason) in enumerate(
        ((b"garbage", "CHECKPOINT_INVALID"), (other, "CHECKPOINT_MISMATCH"))
    ):
        await fabric.coordinator.grant(lease_of(job), definition(), checkpoint=checkpoint)
        await fabric.coordinator.until(lambda n=job: len(fabric.coordinator.failures) > n)
        assert fabric.coordinator.failures[job].reason == reason


async def test_an_ended_lease_is_forgotten(fabric: Fabric) -> None:
    training = definition()
    await fabric.device()
    await fabric.grant(lease_of(), training)
    await fabric.coordinator.until(lambda: fabric.coordinator.heartbeats[-1].resident_bytes > 0)
    await fabric.coordinator.send(
        "d1", lease_end=control_pb2.LeaseEnd(lease=control.lease_to_proto(lease_of()))
    )
    await fabric.coordinator.until(lambda: fabric.coordinator.heartbeats[-1].resident_bytes == 0)


async def test_a_draining_device_takes_no_new_lease_and_finishes_its_own(fabric: Fabric) -> None:
    training = definition()
    await fabric.device()
    await fabric.grant(lease_of(0), training)
    await fabric.coordinator.send("d1", drain=control_pb2.Drain())
    await fabric.coordinator.grant(lease_of(1), training)
    await fabric.coordinator.until(lambda: bool(fabric.coordinator.failures))
    assert fabric.coordinator.failures[0].reason == "DRAINING"
    await fabric.step(lease_of(0), 0, training)


async def test_a_lost_coordinator_is_joined_again_and_leases_are_gone(fabric: Fabric) -> None:
    training = definition()
    await fabric.device()
    await fabric.grant(lease_of(epoch=1), training)
    await fabric.coordinator.stop()
    fabric.coordinator.heartbeats.clear()
    await fabric.coordinator.start(fabric.endpoint)
    await fabric.coordinator.until(lambda: fabric.coordinator.joins == 2)
    await fabric.until(lambda: sum(isinstance(e, DeviceLinkChanged) for e in fabric.events) == 2)
    await fabric.coordinator.until(lambda: bool(fabric.coordinator.heartbeats))
    assert fabric.coordinator.heartbeats[-1].resident_bytes == 0
    await fabric.grant(lease_of(epoch=2), training)
    update = await fabric.step(lease_of(epoch=2), 0, training)
    assert_same(update.weights, reference(training, 1))


async def test_a_lost_base_model_is_joined_again_and_gets_the_current_weights(fabric: Fabric) -> None:
    training = definition()
    await fabric.device()
    await fabric.grant(lease_of(), training)
    await fabric.step(lease_of(), 0, training)
    await fabric.send(lease_of(), 1, gradients(training, 9), last=False)
    endpoint = fabric.coordinator.gradient_endpoint
    await fabric.server.stop()
    fabric.updates.clear()
    fabric.server = GradientServer(
        join_token=TOKEN, on_update=fabric._note(fabric.updates), on_event=fabric._note(fabric.events)
    )
    fabric.server.lease(lease_of(), LeaseTerms(spec=training.spec))
    await fabric.server.start(endpoint)
    assert_same((await fabric.update(lease_of(), 1)).weights, reference(training, 1))
    update = await fabric.step(lease_of(), 1, training)
    assert_same(update.weights, reference(training, 2))


async def test_a_device_serves_two_replicas_and_moves_a_lease_from_one_to_the_other(fabric: Fabric) -> None:
    training, other = definition(), Fabric()
    endpoint = await other.server.start("127.0.0.1:0")
    try:
        await fabric.device()
        await fabric.grant(lease_of(0), training)
        await fabric.step(lease_of(0), 0, training)
        other.server.lease(lease_of(1), LeaseTerms(spec=training.spec))
        await fabric.coordinator.grant(lease_of(1), training, gradient_endpoint=endpoint)
        await other.update(lease_of(1), 0)
        assert_same((await other.step(lease_of(1), 0, training)).weights, reference(training, 1))

        moved = lease_of(0, epoch=2)
        checkpoint = AdapterSession.create(training).checkpoint()
        other.server.lease(moved, LeaseTerms(spec=training.spec))
        await fabric.coordinator.grant(moved, training, checkpoint=checkpoint, gradient_endpoint=endpoint)
        assert_same((await other.update(moved, 0)).weights, initial_weights(training.spec))
        await fabric.server.stop()
        assert_same((await other.step(moved, 0, training)).weights, reference(training, 1))
        assert {update.lease.epoch for update in fabric.updates} == {1}
    finally:
        await other.server.stop()


async def test_a_second_stream_of_one_device_replaces_the_first(fabric: Fabric) -> None:
    await fabric.device("d1")
    await fabric.grant(lease_of(), definition())
    stream = await _impostor(fabric, "d1")
    await fabric.until(lambda: sum(isinstance(e, DeviceLinkChanged) for e in fabric.events) >= 3)
    assert [e.connected for e in fabric.events[:3] if isinstance(e, DeviceLinkChanged)] == [True, False, True]
    await stream.close()


async def test_a_dismissed_device_loses_its_stream_at_once_and_its_old_ticket_opens_none(
    fabric: Fabric,
) -> None:
    # One ticket for both: a ticket asked for in a later second than the dismissal's is a new one.
    old = gradient_ticket(TOKEN, "d9")
    stream = await _impostor(fabric, "d9", ticket=old)
    fabric.server.dismiss("d9")
    assert await stream.receive(timeout_seconds=WAIT_SECONDS) == [], "ended by the server"
    await fabric.until(
        lambda: DeviceLinkChanged(device_id="d9", connected=False, parked=False) in fabric.events
    )
    with pytest.raises(Unauthenticated) as refused:
        await _impostor(fabric, "d9", ticket=old)
    assert refused.value.reason == "TICKET_WRONG"
    await (await _impostor(fabric, "d8")).close()
    later = gradient_ticket(TOKEN, "d9", now=time.time() + 2)
    await (await _impostor(fabric, "d9", ticket=later)).close()


async def test_a_device_cannot_update_anothers_lease(fabric: Fabric) -> None:
    training = definition()
    await fabric.device("d1")
    await fabric.grant(lease_of(), training)
    stream = await _impostor(fabric, "d9")
    await _send_weights(stream, lease_of(), version=1, training=training)
    (answer,) = await stream.receive(timeout_seconds=WAIT_SECONDS)
    assert answer.message.refusal.reason == "FENCED"
    await stream.close()
    assert {update.version for update in fabric.updates} == {0}


@pytest.mark.parametrize(
    ("version", "dropped", "reason"),
    [(5, 0, "STEP_OUT_OF_ORDER"), (1, 1, "UPDATE_INCOMPLETE"), (0, 0, None), (1, 0, None)],
)
async def test_only_complete_versions_in_turn_count(
    fabric: Fabric, version: int, dropped: int, reason: str | None
) -> None:
    training = definition()
    lease = lease_of(device="d9")
    fabric.server.lease(lease, LeaseTerms(spec=training.spec))
    stream = await _impostor(fabric, "d9")
    await _send_weights(stream, lease, version=0, training=training)
    await _send_weights(stream, lease, version=version, training=training, dropped=dropped)
    if reason is None:
        await fabric.until(lambda: len(fabric.updates) == 2)
    else:
        assert (await fabric.refused(reason)).lease == lease
        assert len(fabric.updates) == 1
    await stream.close()


async def test_an_update_of_an_older_epoch_is_fenced(fabric: Fabric) -> None:
    training = definition()
    fabric.server.lease(lease_of(epoch=2, device="d9"), LeaseTerms(spec=training.spec))
    stream = await _impostor(fabric, "d9")
    await _send_weights(stream, lease_of(epoch=1, device="d9"), version=0, training=training)
    (answer,) = await stream.receive(timeout_seconds=WAIT_SECONDS)
    assert answer.message.refusal.reason == "FENCED"
    assert not fabric.updates
    await stream.close()


async def test_an_update_of_the_wrong_shape_is_refused(fabric: Fabric) -> None:
    lease = lease_of(device="d9")
    fabric.server.lease(lease, LeaseTerms(spec=definition(rank=4).spec))
    stream = await _impostor(fabric, "d9")
    await _send_weights(stream, lease, version=0, training=definition(rank=3))
    assert (await fabric.refused("UPDATE_INVALID")).lease == lease
    assert not fabric.updates
    await stream.close()


async def test_taps_for_a_device_that_is_not_there_are_refused(fabric: Fabric) -> None:
    await fabric.send(lease_of(device="nobody"), 0, gradients(definition(), 0))
    assert (await fabric.refused("DEVICE_UNREACHABLE")).lease.device_id == "nobody"


async def test_a_slow_device_is_parked_within_its_credit_and_nobody_else(fabric: Fabric) -> None:
    training = definition(sites=(_wide_site(),))
    slow, fast = lease_of(0, device="slow"), lease_of(1, device="d1")
    await fabric.device("d1")
    await fabric.grant(fast, training)
    stream = await _impostor(fabric, "slow", credit_bytes=300_000)
    fabric.server.lease(slow, LeaseTerms(spec=training.spec))
    for version in range(8):
        await fabric.send(slow, version, gradients(training, 0))
    parked = DeviceLinkChanged(device_id="slow", connected=True, parked=True)
    await fabric.until(lambda: parked in fabric.events)
    reading = asyncio.create_task(_read_all(stream))  # without ever returning credit
    await asyncio.sleep(0.3)
    assert stream.bytes_received <= 300_000
    assert_same((await fabric.step(fast, 0, training)).weights, reference(training, 1))

    link = fabric.server._links["slow"]
    assert link.waiting_bytes > 1_000_000
    while link.waiting_bytes or link.parked:
        credit = control_pb2.Credit(bytes=link._in_flight_bytes)
        await stream.send_control(control_pb2.GradientControl(credit=credit))
        await asyncio.sleep(0.01)
    assert DeviceLinkChanged(device_id="slow", connected=True, parked=False) == fabric.events[-1]
    reading.cancel()
    await stream.close()


async def test_credit_that_was_never_used_ends_the_stream(fabric: Fabric) -> None:
    stream = await _impostor(fabric, "d9")
    await stream.send_control(control_pb2.GradientControl(credit=control_pb2.Credit(bytes=1)))
    with pytest.raises(Exception, match="more than was in flight"):
        await stream.receive(timeout_seconds=WAIT_SECONDS)
    await stream.close()


async def test_a_device_returns_all_the_credit_it_was_given(fabric: Fabric) -> None:
    training = definition(sites=(_wide_site(),))
    await fabric.device(credit_bytes=300_000)
    await fabric.grant(lease_of(), training)
    for version in range(6):
        update = await fabric.step(lease_of(), version, training)
    assert_same(update.weights, reference(training, 6))
    await fabric.until(lambda: fabric.server._links["d1"]._in_flight_bytes == 0)


def _wide_site() -> Site:
    return Site(index=3, name="wide", kind=SiteKind.LINEAR, in_features=20_000, out_features=8, input_group=3)


async def _impostor(fabric: Fabric, device_id: str, *, credit_bytes: int = 1 << 20, ticket: str = "") -> Any:
    stream = await connect(fabric.coordinator.gradient_endpoint, GRADIENTS)
    hello = control_pb2.GradientHello(
        device_id=device_id,
        ticket=ticket or gradient_ticket(TOKEN, device_id),
        protocol_version=PROTOCOL_VERSION,
        credit_bytes=credit_bytes,
    )
    await introduce(stream, control_pb2.GradientControl(hello=hello), limits=FrameLimits())
    return stream


async def _send_weights(
    stream: Any, lease: Lease, *, version: int, training: TrainingDefinition, dropped: int = 0
) -> None:
    weights_P = FlatLayout(training.spec).flat(initial_weights(training.spec))
    if not dropped:
        address = TensorAddress(
            job_id=lease.job_id, epoch=lease.epoch, version=version, kind=TensorKind.WEIGHTS
        )
        await stream.send_tensor(address, to_wire(weights_P))
    end = control_pb2.UpdateEnd(lease=control.lease_to_proto(lease), version=version)
    await stream.send_control(control_pb2.GradientControl(update_end=end))


async def _read_all(stream: Any) -> None:
    while await stream.receive():
        pass
