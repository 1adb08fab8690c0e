"""The service with a real tapped model, real gRPC and real devices: exact steps, fenced leases, events."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cola_runtime.adapter_spec import LeaseTerms, lora_spec
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.adapters.checkpoint_format import TrainingDefinition
from cola_runtime.base_model.model import TappedModel
from cola_runtime.base_model.service import BaseModelService
from cola_runtime.base_model.updates import Update
from cola_runtime.device.agent import DeviceAgent
from cola_runtime.device.config import DeviceConfig
from cola_runtime.device.session import AdapterSession
from cola_runtime.encodings import Encoding, TapPlan
from cola_runtime.errors import Conflict, Fenced
from cola_runtime.rows import Row
from cola_runtime.testing.tiny_models import save_tiny_model
from cola_runtime.types import (
    BaseEvent,
    BaseStep,
    Gang,
    LearningRateSchedule,
    Lease,
    Membership,
    OptimizerHyperparameters,
    Segment,
    StepApplied,
    StepRefused,
    TensorKey,
)
from tests.device.fake_coordinator import TOKEN, WAIT_SECONDS, FakeCoordinator

JOBS = ("job-" + "0a" * 16, "job-" + "0b" * 16)
ENCODINGS = (Encoding.ADAPTER_GRADIENT, Encoding.ACTIVATIONS)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("gpt2"), dtype="float64")


def load(path: Path) -> TappedModel:
    return TappedModel.load(path, dtype="float64", attention="eager", threads=1)


def training_of(model: TappedModel, rank: int) -> TrainingDefinition:
    return TrainingDefinition(
        spec=lora_spec(
            rank=rank, alpha=2.0 * rank, use_rslora=False, seed=rank, sites=model.sites, dtype="float64"
        ),
        optimizer=OptimizerHyperparameters(kind="adamw", learning_rate=0.01, max_grad_norm=1.0),
        schedule=LearningRateSchedule(kind="constant", warmup_steps=0, total_steps=100),
    )


def rows(seed: int, count: int) -> tuple[Row, ...]:
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(random.integers(5, 12))
        weights = np.ones(length, np.float32)
        weights[:2] = 0
        made.append(Row(tokens=random.integers(0, 250, length).astype(np.int32), weights=weights))
    return tuple(made)


def lease_of(job: int, *, epoch: int = 1) -> Lease:
    return Lease(job_id=JOBS[job], epoch=epoch, device_id=f"d{job}")


def segments(lease: Lease, version: int, job: int) -> list[Segment]:
    """The two microbatches of one step."""
    parts = [rows(1000 * job + 10 * version + part, 2) for part in range(2)]
    denominator = float(sum(row.weights.sum() for part in parts for row in part))
    return [
        Segment(
            lease=lease,
            version=version,
            rows=part,
            loss_denominator=denominator,
            taps=TapPlan(ENCODINGS[job]),
            microbatch=number,
            last_microbatch=number == 1,
        )
        for number, part in enumerate(parts)
    ]


@dataclass
class Bench:
    """The service, a coordinator and two devices."""

    service: BaseModelService
    coordinator: FakeCoordinator
    trainings: tuple[TrainingDefinition, TrainingDefinition]
    seen: int = 0

    def __post_init__(self) -> None:
        self.events: list[BaseEvent] = []

    async def until(self, wanted: type[BaseEvent], **fields: object) -> BaseEvent:
        """Read events until one of this kind and these fields has come."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                for event in self.events:
                    if isinstance(event, wanted) and all(getattr(event, k) == v for k, v in fields.items()):
                        return event
                self.seen, events = await self.service.next_events(self.seen)
                self.events += events

    async def grant(self, job: int, *, epoch: int = 1, membership: Membership | None = None) -> None:
        lease = lease_of(job, epoch=epoch)
        await self.service.lease(lease, LeaseTerms(spec=self.trainings[job].spec, membership=membership))
        await self.coordinator.grant(lease, self.trainings[job], every=2)
        await self.until(StepApplied, lease=lease, version=0)


@pytest.fixture
async def bench(model_path: Path) -> AsyncIterator[Bench]:
    torch.set_num_threads(1)
    model = load(model_path)
    service = BaseModelService(model, name="tiny", join_token=TOKEN)
    coordinator = FakeCoordinator(await service.start("127.0.0.1:0"))
    endpoint = await coordinator.start()
    agents = [
        DeviceAgent(DeviceConfig(device_id=f"d{n}", coordinator_endpoint=endpoint, join_token=TOKEN))
        for n in range(2)
    ]
    tasks = [asyncio.create_task(agent.run()) for agent in agents]
    bench = Bench(service, coordinator, (training_of(model, 2), training_of(model, 5)))
    await coordinator.until(lambda: len(coordinator.streams) == len(agents))
    yield bench
    for agent in agents:
        agent.stop()
    await asyncio.gather(*tasks)
    await coordinator.stop()
    await service.stop()


def train_in_process(path: Path, job: int, *, steps: int) -> dict[TensorKey, Tensor]:
    """The same rows, alone, without any wire."""
    model = load(path)
    training = training_of(model, (2, 5)[job])
    session = AdapterSession.create(training)
    lease = lease_of(job)
    for version in range(steps):
        model.install(lease, training.spec, version, session.weights())
        for segment in segments(lease, version, job):
            model.run(
                BaseStep(number=0, segments=(segment,)),
                lambda tap: [session.add(k, t, version=session.version) for k, t in tap.tensors.items()],  # type: ignore[arg-type, return-value]
            )
        session.apply(version=version)
    return session.weights()


async def test_mixed_training_through_the_wire_equals_training_alone(bench: Bench, model_path: Path) -> None:
    steps = 4
    for job in range(2):
        await bench.grant(job)
    for version in range(steps):
        parts = [segments(lease_of(job), version, job) for job in range(2)]
        for number, pair in enumerate(zip(*parts, strict=True)):
            result = await bench.service.run(BaseStep(number=2 * version + number, segments=pair))
            assert [loss.reason for loss in result.losses] == [None, None]
        for job in range(2):
            applied = await bench.until(StepApplied, lease=lease_of(job), version=version + 1)
            assert applied.bytes_up > applied.bytes_down > 0  # type: ignore[union-attr]
    for job in range(2):
        await bench.coordinator.until(
            lambda j=job: bench.coordinator.checkpoints.get(JOBS[j], (0,))[0] == steps
        )
        trained = AdapterSession.restore(bench.coordinator.checkpoints[JOBS[job]][1]).weights()
        for key, expected in train_in_process(model_path, job, steps=steps).items():
            assert torch.linalg.norm(trained[key] - expected) <= 1e-9 * torch.linalg.norm(expected) + 1e-15


async def test_a_busy_event_loop_does_not_mix_the_taps_of_two_base_steps(bench: Bench) -> None:
    """Both are computed before the loop learns of the first one's end."""
    await bench.grant(0)
    runs = [
        asyncio.create_task(bench.service.run(BaseStep(number=number, segments=(segment,))))
        for number, segment in enumerate(segments(lease_of(0), 0, 0))
    ]
    await asyncio.sleep(0)  # both wait for the compute thread now
    time.sleep(1.0)  # noqa: ASYNC251 - the loop is meant to be blocked
    await asyncio.gather(*runs)
    await bench.until(StepApplied, lease=lease_of(0), version=1)
    assert not [event for event in bench.events if isinstance(event, StepRefused)]


async def test_forward_only_sends_no_taps(bench: Bench) -> None:
    await bench.grant(0)
    segment = segments(lease_of(0), 0, 0)[0]
    result = await bench.service.run(BaseStep(number=1, segments=(segment,), train=False))
    assert result.losses[0].loss_sum > 0
    await bench.service.run(BaseStep(number=2, segments=tuple(segments(lease_of(0), 0, 0)[:1])))
    await bench.service.run(BaseStep(number=3, segments=tuple(segments(lease_of(0), 0, 0)[1:])))
    await bench.until(StepApplied, lease=lease_of(0), version=1)


async def test_a_segment_that_was_not_computed_is_not_applied(bench: Bench) -> None:
    await bench.grant(0)
    stale = segments(lease_of(0), 3, 0)[1]
    result = await bench.service.run(BaseStep(number=1, segments=(stale,)))
    assert result.losses[0].reason == "VERSION_STALE"
    for segment in segments(lease_of(0), 0, 0):
        await bench.service.run(BaseStep(number=2, segments=(segment,)))
    await bench.until(StepApplied, lease=lease_of(0), version=1)
    assert not [event for event in bench.events if isinstance(event, StepRefused)]


async def test_an_older_lease_is_fenced_and_an_ended_one_evicted(bench: Bench) -> None:
    await bench.grant(0, epoch=2)
    with pytest.raises(Fenced):
        await bench.service.lease(lease_of(0, epoch=1), LeaseTerms(spec=bench.trainings[0].spec))
    await bench.service.end_lease(JOBS[0], 1)
    segment = segments(lease_of(0, epoch=2), 0, 0)[0]
    assert (await bench.service.run(BaseStep(number=1, segments=(segment,), train=False))).losses[
        0
    ].reason is None
    await bench.service.end_lease(JOBS[0], 2)
    result = await bench.service.run(BaseStep(number=2, segments=(segment,), train=False))
    assert result.losses[0].reason == "ADAPTER_UNKNOWN"


async def test_an_update_that_is_overtaken_by_the_leases_end_stays_out_of_the_bank(bench: Bench) -> None:
    await bench.grant(0)
    spec = bench.trainings[0].spec
    late = Update(
        lease=lease_of(0),
        terms=LeaseTerms(spec=spec),
        version=1,
        weights=initial_weights(spec),
        learning_rate=0.0,
        gradient_norm=0.0,
        device_seconds=0.0,
        bytes_up=0,
        bytes_down=0,
        shards=(),
    )
    bench.service._install_soon(late)
    await bench.service.end_lease(JOBS[0], 1)
    segment = segments(lease_of(0), 1, 0)[0]
    result = await bench.service.run(BaseStep(number=1, segments=(segment,), train=False))
    assert result.losses[0].reason == "ADAPTER_UNKNOWN"


async def test_an_update_is_told_while_a_base_step_computes_and_the_next_one_is_of_it(bench: Bench) -> None:
    """Else its job would always wait for one base step more: the next is chosen as the running one ends."""
    await bench.grant(0)
    computing, may_end = asyncio.Event(), threading.Event()

    def compute() -> None:
        bench_loop.call_soon_threadsafe(computing.set)
        assert may_end.wait(WAIT_SECONDS)

    bench_loop = asyncio.get_running_loop()
    for segment in segments(lease_of(0), 0, 0):
        running = asyncio.create_task(bench.service.run(BaseStep(number=1, segments=(segment,))))
        if segment.last_microbatch:
            occupied = asyncio.create_task(bench.service._lane.run(compute))
        await running
    await computing.wait()
    await bench.until(StepApplied, lease=lease_of(0), version=1)
    following = segments(lease_of(0), 1, 0)[0]
    of_it = asyncio.create_task(bench.service.run(BaseStep(number=2, segments=(following,), train=False)))
    await asyncio.sleep(0)
    may_end.set()
    await occupied
    assert (await of_it).losses[0].reason is None


async def test_an_update_that_cannot_be_installed_is_told_to_the_coordinator(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(update: Update) -> None:
        raise RuntimeError("no memory for it")

    await bench.grant(0)
    monkeypatch.setattr(bench.service, "_prepared", broken)
    for segment in segments(lease_of(0), 0, 0):
        await bench.service.run(BaseStep(number=1, segments=(segment,)))
    await bench.until(StepRefused, lease=lease_of(0), reason="INSTALL_FAILED")


async def test_a_gangs_member_with_nan_weights_is_told_to_the_coordinator_and_its_mates_go_on(
    bench: Bench,
) -> None:
    gang = Gang(name="group/a-name-that-nobody-guesses", combine="mean")
    for job in (0, 1):
        await bench.grant(job, membership=Membership(gang=gang))
    spec = bench.trainings[0].spec
    poisoned = {key: torch.full_like(w, torch.nan) for key, w in initial_weights(spec).items()}
    sick = Update(
        lease=lease_of(0),
        terms=LeaseTerms(spec=spec, membership=Membership(gang=gang)),
        version=1,
        weights=poisoned,
        learning_rate=0.0,
        gradient_norm=0.0,
        device_seconds=0.0,
        bytes_up=0,
        bytes_down=0,
        shards=(),
    )
    bench.service._install_soon(sick)
    await bench.until(StepRefused, lease=lease_of(0), reason="NON_FINITE_ADAPTER")
    for segment in segments(lease_of(1), 0, 1):
        result = await bench.service.run(BaseStep(number=1, segments=(replace(segment, gang=gang),)))
        assert np.isfinite(result.losses[0].loss_sum)
    await bench.until(StepApplied, lease=lease_of(1), version=1)


async def test_generation_uses_the_compute_thread_and_the_bare_model(bench: Bench) -> None:
    await bench.grant(0)
    options = {"max_new_tokens": 5, "temperature": 0.0, "seed": 0, "stop_ids": ()}
    bare = await bench.service.generate(None, [[5, 6, 7]], **options)  # type: ignore[arg-type]
    adapted = await bench.service.generate(JOBS[0], [[5, 6, 7]], **options)  # type: ignore[arg-type]
    assert bare == adapted  # B is zero at version 0
    assert [len(tokens) for tokens in bare] == [5]


async def test_events_are_numbered_and_a_lost_place_is_told(bench: Bench) -> None:
    await bench.grant(0)
    last = bench.seen
    assert last == len(bench.events) >= 2
    with pytest.raises(Conflict) as caught:
        await bench.service.next_events(last + 1)
    assert caught.value.reason == "EVENTS_LOST"


async def test_the_description_names_the_gradient_endpoint(bench: Bench) -> None:
    description = await bench.service.describe()
    assert description.name == "tiny"
    assert description.gradient_endpoint == bench.coordinator.gradient_endpoint
