"""Devices that compute wrong are found by making their steps again, and put out; the job loses nothing."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from moved_jobs import move_once

from cola_runtime.base_model.gradient_server import GradientServer
from cola_runtime.base_model.retained import RetainedSteps
from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.config import DeviceSettings, ServiceSettings, SpotCheckSettings
from cola_runtime.device.agent import DeviceAgent
from cola_runtime.device.config import DeviceConfig
from cola_runtime.device.session import AdapterSession
from cola_runtime.device.worker import DeviceWorker
from cola_runtime.errors import Unauthenticated
from cola_runtime.runtime.coordinator import RunningService
from cola_runtime.scheduler import spot_checks
from cola_runtime.scheduler.spot_checks import Interval, SpotChecks
from cola_runtime.spec import JobSpec
from cola_runtime.testing.exactness import service_for
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model

WAIT_SECONDS = 60.0
STEPS = 6
ROWS = b"".join(json.dumps({"prompt": "ab" * n, "completion": "cde"}).encode() + b"\n" for n in range(1, 9))


def spec(**changes: Any) -> JobSpec:
    fields = {"name": "chat", "base_model": "tiny", "steps": STEPS, "rows_per_step": 4, "checkpoint_every": 2}
    return JobSpec.model_validate({**fields, "trust": ["community"], **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), dtype="float32")


class Yard:
    """A running service with one trusted device, its operator, and devices of other people."""

    def __init__(self, service: RunningService, operator: AsyncClient) -> None:
        self.service, self.operator = service, operator
        self._token = ""
        self.tasks: list[asyncio.Task[None]] = []

    async def community(self, name: str) -> DeviceAgent:
        if not self._token:
            self._token = (await self.operator.create_join_token("community", reusable=True)).token
        config = DeviceConfig(
            device_id=name,
            coordinator_endpoint=self.service.device_endpoint,
            join_token=self._token,
            first_retry_seconds=0.02,
        )
        agent = DeviceAgent(config)
        self.tasks.append(asyncio.create_task(agent.run()))
        await self.until(lambda found: name in found)
        return agent

    async def until(self, condition: Any) -> None:
        """Until it holds of the names of the connected devices."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            names = {each.device_id for each in (await self.operator.describe()).devices}
            if condition(names):
                return
            assert time.monotonic() < deadline, names
            await asyncio.sleep(0.02)

    async def submit(self, **changes: Any) -> AsyncJobHandle:
        return await self.operator.submit(spec(**changes), training=ROWS)


@asynccontextmanager
async def yard(
    folder: Path, model: Path, *, share: float = 1.0, trusted: int = 1, replicas: int = 1
) -> AsyncIterator[Yard]:
    settings: ServiceSettings = service_for(folder, model=model, name="tiny", dtype="float32")
    [chosen] = settings.base_models
    settings = settings.model_copy(
        update={
            "base_models": (chosen.model_copy(update={"replicas": replicas}),),
            "scheduler": settings.scheduler.model_copy(update={"rebalance_seconds": 0.02}),
            "devices": DeviceSettings(count=trusted, heartbeat_seconds=0.1),
            "spot_checks": SpotCheckSettings(community=share),
        }
    )
    async with running_in_process(settings) as (service, _):
        url = f"grpc://{service.endpoint}"
        async with AsyncClient(base_url=url, api_key=service.first_key) as operator:
            made = Yard(service, operator)
            try:
                yield made
            finally:
                for task in made.tasks:
                    task.cancel()
                await asyncio.gather(*made.tasks, return_exceptions=True)


async def kinds(handle: AsyncJobHandle) -> list[str]:
    return [event.kind async for event in handle.events(follow=False)]


async def last_checkpoint(handle: AsyncJobHandle) -> str:
    found = (await handle.checkpoints())[-1]
    assert found.version == STEPS
    return found.sha256


@pytest.fixture(scope="module")
def honest(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """sha256 of the last checkpoint, trained by an honest device each of whose steps is checked."""

    async def train() -> str:
        async with yard(tmp_path_factory.mktemp("honest"), model) as at:
            await at.community("garage")
            handle = await at.submit()
            await handle.wait(WAIT_SECONDS)
            events = [event async for event in handle.events(follow=False)]
            passed = [event for event in events if event.kind == "spot_check.passed"]
            assert [(each.data["first"], each.data["last"]) for each in passed] == [(0, 2), (2, 4), (4, 6)]
            assert all("all bits" in each.message for each in passed)
            return await last_checkpoint(handle)

    return asyncio.run(train())


@pytest.fixture
def liar(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Makes one worker lie: `liar["worker"]` is whose sessions change their state as `liar["how"]` says."""
    lying: dict[str, Any] = {"worker": None, "how": None}
    apply = DeviceWorker._apply

    def lie(worker: DeviceWorker, held: Any, version: int, **norm: Any) -> Any:
        if worker is lying["worker"]:
            lying["how"](held.session, version)
        return apply(worker, held, version, **norm)

    monkeypatch.setattr(DeviceWorker, "_apply", lie)
    return lying


def spoil_weights(session: AdapterSession, version: int) -> None:
    if version == 3:
        session._weights_P[5] += 1e-3


def spoil_optimizer(session: AdapterSession, version: int) -> None:
    if version == 3:
        session._optimizer._exp_avg_sq_P *= 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", [spoil_weights, spoil_optimizer])
async def test_a_device_that_computes_otherwise_is_put_out_and_its_steps_are_made_again(
    honest: str, model: Path, tmp_path: Path, liar: dict[str, Any], how: Any
) -> None:
    async with yard(tmp_path, model) as at:
        agent = await at.community("garage")
        liar.update(worker=agent._worker, how=how)
        handle = await at.submit()
        await at.until(lambda names: "garage" not in names)
        await at.community("attic")
        await handle.wait(WAIT_SECONDS)
        assert await last_checkpoint(handle) == honest
        events = [event async for event in handle.events(follow=False)]
        (failed,) = [event for event in events if event.kind == "spot_check.failed"]
        assert (failed.data["first"], failed.data["device_id"]) == (2, "garage")
        assert [event.data["to"] for event in events if event.kind == "job.rewound"] == [2], "the checked one"
        assert {step.device_id for step in (await handle.metrics())[2:]} == {"attic"}

        (known,) = await at.operator.registered_devices()
        assert (known.device_id, known.quarantine_reason) == ("garage", "SPOT_CHECK_FAILED")
        assert (await at.operator.describe()).quarantined_devices == ("garage",)
        audited = [each for each in await at.operator.audit(limit=1000) if each.subject == "garage"]
        assert "device.quarantined" in {each.kind for each in audited}
        refusals = [e for e in await at.operator.audit(limit=1000) if e.kind == "device.refused"]
        assert {each.message for each in refusals} == {"DEVICE_QUARANTINED"}
        with pytest.raises(Unauthenticated):
            await at.service.store.devices.check_not_quarantined("garage")
        await at.operator.reinstate_device("garage")
        await at.until(lambda names: {"garage", "attic"} <= names)


async def test_a_device_that_leaves_before_the_intervals_end_is_checked_all_the_same(
    honest: str, model: Path, tmp_path: Path, liar: dict[str, Any]
) -> None:
    async with yard(tmp_path, model) as at:
        agent = await at.community("garage")
        draining: list[asyncio.Task[None]] = []
        loop = asyncio.get_running_loop()

        def lie_and_leave(session: AdapterSession, version: int) -> None:
            if version == 3:
                session._weights_P[5] += 1e-3
                loop.call_soon_threadsafe(lambda: draining.append(asyncio.create_task(agent.drain())))

        liar.update(worker=agent._worker, how=lie_and_leave)
        handle = await at.submit(checkpoint_every=6)
        async with asyncio.timeout(WAIT_SECONDS):
            async for event in handle.events():
                if event.kind == "spot_check.failed":
                    break
        await at.community("attic")
        await handle.wait(WAIT_SECONDS)
        assert await last_checkpoint(handle) == honest


async def test_steps_are_checked_at_the_replica_that_made_them_when_the_job_has_moved(
    honest: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the chain goes on from one replica to the other."""
    move_once(monkeypatch, at=3)
    async with yard(tmp_path, model, replicas=2) as at:
        await at.community("garage")
        handle = await at.submit()
        await handle.wait(WAIT_SECONDS)
        assert await last_checkpoint(handle) == honest
        events = [event async for event in handle.events(follow=False)]
        leases = [(e.data["replica"], e.data["version"]) for e in events if e.kind == "lease.granted"]
        assert leases == [("tiny/0", 0), ("tiny/1", 3)]
        assert not {"lease.lost", "spot_check.undecided"} & {event.kind for event in events}
        passed = [event for event in events if event.kind == "spot_check.passed"]
        intervals = sorted((each.data["first"], each.data["last"]) for each in passed)
        assert intervals == [(0, 2), (2, 3), (3, 4), (4, 6)]
        assert all("all bits" in each.message for each in passed)


async def test_a_replica_that_is_away_when_steps_are_to_be_replayed_costs_no_check(
    honest: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its actor's own death: tests/faults/test_killed_actors.py."""
    monkeypatch.setattr(spot_checks, "RETRY_SECONDS", 0.02)
    replay, attempts = SpotChecks._replay, []

    async def away_at_first(self: SpotChecks, interval: Interval, *rest: Any) -> float:
        attempts.append(interval.first)
        interval.replica.ready = len(attempts) > 2
        return await replay(self, interval, *rest)

    monkeypatch.setattr(SpotChecks, "_replay", away_at_first)
    async with yard(tmp_path, model) as at:
        await at.community("garage")
        handle = await at.submit()
        await handle.wait(WAIT_SECONDS)
        assert await last_checkpoint(handle) == honest
        told = [kind for kind in await kinds(handle) if kind.startswith("spot_check")]
        assert (told, attempts) == (3 * ["spot_check.passed"], [0, 0, 0, 2, 4])


async def test_who_is_put_out_has_no_stream_left_at_any_replica_and_the_job_goes_on_at_the_other(
    honest: str, model: Path, tmp_path: Path, liar: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: set[GradientServer] = set()
    dismiss = GradientServer.dismiss

    def noted(server: GradientServer, device_id: str) -> None:
        dismiss(server, device_id)
        servers.add(server)

    monkeypatch.setattr(GradientServer, "dismiss", noted)
    move_once(monkeypatch, at=1)
    async with yard(tmp_path, model, replicas=2) as at:
        agent = await at.community("garage")
        liar.update(worker=agent._worker, how=spoil_weights)
        handle = await at.submit()
        await at.until(lambda names: "garage" not in names)
        assert len(servers) == 2
        await at.community("attic")
        await handle.wait(WAIT_SECONDS)
        assert not [server for server in servers if "garage" in server._links]
        assert await last_checkpoint(handle) == honest
        failed = [event async for event in handle.events(follow=False) if event.kind == "spot_check.failed"]
        assert [event.data["device_id"] for event in failed] == ["garage"]


async def test_without_a_share_nothing_is_retained_or_checked(
    honest: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RetainedSteps, "_sent", lambda *_: pytest.fail("retained"))
    async with yard(tmp_path, model, share=0.0) as at:
        await at.community("garage")
        handle = await at.submit()
        await handle.wait(WAIT_SECONDS)
        assert await last_checkpoint(handle) == honest
        assert not [kind for kind in await kinds(handle) if kind.startswith("spot_check")]


async def test_steps_that_are_too_large_to_keep_are_not_checked_and_the_job_goes_on(
    honest: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RetainedSteps.__init__, "__kwdefaults__", {"most_bytes": 1000})
    async with yard(tmp_path, model) as at:
        await at.community("garage")
        handle = await at.submit()
        await handle.wait(WAIT_SECONDS)
        assert await last_checkpoint(handle) == honest
        events = [event async for event in handle.events(follow=False)]
        undecided = [event for event in events if event.kind == "spot_check.undecided"]
        assert len(undecided) == 3
        assert all("not all kept" in event.message for event in undecided)


async def test_without_a_trusted_device_beside_nothing_is_decided(
    honest: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spot_checks, "CHECKER_SECONDS", 0.2)
    async with yard(tmp_path, model, trusted=0) as at:
        await at.community("garage")
        await at.community("attic")
        handle = await at.submit()
        await handle.wait(WAIT_SECONDS)
        assert await last_checkpoint(handle) == honest
        assert (await kinds(handle)).count("spot_check.undecided") == 3
        assert await at.operator.registered_devices() == []


async def sharded(at: Yard) -> AsyncJobHandle:
    for name in ("garage", "shed"):
        await at.community(name)
    return await at.submit(shards=2)


@pytest.fixture(scope="module")
def honest_shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """As `honest`, of an adapter on two devices."""

    async def train() -> str:
        async with yard(tmp_path_factory.mktemp("shards"), model) as at:
            handle = await sharded(at)
            await handle.wait(WAIT_SECONDS)
            events = [event async for event in handle.events(follow=False)]
            checked = [event for event in events if event.kind.startswith("spot_check")]
            found = sorted((each.data["first"], each.data["device_id"]) for each in checked)
            assert found == [(first, name) for first in (0, 2, 4) for name in ("garage", "shed")]
            assert all("all bits" in each.message for each in checked)
            assert await at.service.store.checkpoints.pending_checks() == []
            records = await at.service.store.checkpoints.of(handle.job_id)
            assert all(each.checked_at for each in records)
            return await last_checkpoint(handle)

    return asyncio.run(train())


@pytest.fixture
def wrong_norms(monkeypatch: pytest.MonkeyPatch) -> set[DeviceWorker]:
    """Workers whose sessions state other norms than their gradients have."""
    lying: set[DeviceWorker] = set()
    sessions: set[AdapterSession] = set()
    consume, norms = DeviceWorker.consume, AdapterSession.gradient_norms

    def noted(worker: DeviceWorker, items: Any) -> Any:
        if worker in lying:
            sessions.update(held.session for held in worker._held.values())
        return consume(worker, items)

    def wrong(session: AdapterSession) -> Any:
        return norms(session) * (100 if session in sessions and session.version == 2 else 1)

    monkeypatch.setattr(DeviceWorker, "consume", noted)
    monkeypatch.setattr(AdapterSession, "gradient_norms", wrong)
    return lying


@pytest.mark.parametrize("lie", ["weights", "norms"])
async def test_the_device_of_a_shard_that_lies_is_put_out_and_the_others_are_not(
    honest_shards: str,
    model: Path,
    tmp_path: Path,
    liar: dict[str, Any],
    wrong_norms: set[DeviceWorker],
    lie: str,
) -> None:
    """Norms that one of them makes up spoil every shard, and each device has done what it was told."""
    async with yard(tmp_path, model) as at:
        agent = await at.community("garage")
        if lie == "weights":
            liar.update(worker=agent._worker, how=spoil_weights)
        else:
            wrong_norms.add(agent._worker)
        await at.community("shed")
        handle = await at.submit(shards=2)
        await at.until(lambda names: "garage" not in names)
        await at.community("attic")
        await handle.wait(WAIT_SECONDS)
        assert await last_checkpoint(handle) == honest_shards
        events = [event async for event in handle.events(follow=False)]
        failed = [(e.data["first"], e.data["device_id"]) for e in events if e.kind == "spot_check.failed"]
        assert failed == [(2, "garage")]
        [known] = await at.operator.registered_devices()
        assert known.device_id == "garage"
