"""Ray itself fails under a service: its head dies, a node with the base model dies, a raylet only hangs."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from ray.util import get_node_ip_address

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.process_environment import child_environment
from cola_runtime.testing.soak_fleet import SoakFleet
from cola_runtime.testing.soak_jobs import SoakJob, soak_jobs, train_expected
from tests.faults.judging import Accept, Faultless, Outcome, judge
from tests.faults.processes import finish, free_port, reach

JOB = soak_jobs(steps=150, seed=0)[0]  # by itself in its base steps
TOKENS_PER_MINUTE = 30_000  # of the tenant: about four steps a second, so that faults find it at work
FASTER_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 4,
}
START_SECONDS = 60.0
STARTED = "Ray runtime started"

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Faultless:
    expected = asyncio.run(train_expected(model, tmp_path_factory.mktemp("undisturbed"), [JOB]))[JOB.name]
    return Faultless(
        losses=expected.losses, checkpoint_sha256=hashlib.sha256(expected.checkpoint).hexdigest()
    )


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of processes started here: a driver with an address shows no token unless it is told to."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


async def ended(
    client: AsyncClient,
    handle: AsyncJobHandle,
    undisturbed: Faultless,
    *,
    of: tuple[str, str],
    fault: float,
    fleet: SoakFleet,
) -> Outcome:
    """What the (part, case) came to, once the job has ended."""
    part, case = of
    handle = await finish(client, handle.job_id)
    return await judge(handle, undisturbed, part=part, case=case, faults=[fault], data_dir=fleet.data_dir)


class RayNode:
    """`ray start --block` and what it started, to be killed as a machine would die."""

    def __init__(self, *arguments: str, log: Path) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
        words = [*command, "--num-cpus=0", "--object-store-memory=100000000", *arguments]
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                words,
                stdout=out,
                stderr=out,
                env=child_environment(OMP_NUM_THREADS="1"),
                start_new_session=True,
            )
        self._wait_started(log)

    def _wait_started(self, log: Path) -> None:
        """Raylets of one machine that start at once take each other's sockets."""
        deadline = time.monotonic() + START_SECONDS
        while STARTED not in log.read_text(errors="replace"):
            if time.monotonic() > deadline:
                self.die()
                raise TimeoutError(log.read_text(errors="replace"))
            time.sleep(0.1)

    @classmethod
    def head(cls, port: int, *, resources: dict[str, int], log: Path) -> RayNode:
        return cls(
            *("--head", f"--port={port}", "--include-dashboard=false"),
            f"--ray-client-server-port={free_port()}",
            f"--system-config={json.dumps(FASTER_HEALTH_CHECKS)}",
            f"--resources={json.dumps(resources)}",
            log=log,
        )

    @classmethod
    def worker(cls, address: str, *, log: Path) -> RayNode:
        return cls(f"--address={address}", '--resources={"cola_base_model": 1}', log=log)

    def process(self, name: str) -> psutil.Process | None:
        return next((process for process in self._below() if name in _name(process)), None)

    def die(self) -> None:
        below = self._below()
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        for process in below:
            with suppress(psutil.Error):
                process.resume()
                process.kill()
        self._process.wait()

    def _below(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.Error:
            return []


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


@contextmanager
def cluster(folder: Path, *, workers: int) -> Iterator[tuple[str, list[RayNode]]]:
    """A head without resources and so many nodes for a base model; its address and the nodes."""
    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    nodes = [RayNode.head(port, resources={}, log=folder / "head.log")]
    try:
        for number in range(workers):
            nodes.append(RayNode.worker(address, log=folder / f"worker-{number}.log"))
        yield address, nodes
    finally:
        for node in reversed(nodes):
            node.die()


@asynccontextmanager
async def training(
    fleet: SoakFleet, job: SoakJob, *, at: int
) -> AsyncIterator[tuple[AsyncClient, AsyncJobHandle]]:
    async with fleet, fleet.client(fleet.first_key) as operator:
        key = (await operator.create_key("slow", tokens_per_minute=TOKENS_PER_MINUTE)).key
        async with fleet.client(key) as client:
            handle = await client.submit(job.spec, training=job.training, evaluation=job.evaluation)
            await reach(handle, at)
            yield client, handle


def left_with(problems: Sequence[str], code: int, reason: str) -> bool:
    return any(f"coordinator ended by itself with {code}:" in each and reason in each for each in problems)


async def test_a_service_whose_own_head_dies_leaves_with_a_reason_and_goes_on_when_it_is_started_again(
    model: Path, tmp_path: Path, undisturbed: Faultless, accept: Accept
) -> None:
    fleet = SoakFleet(tmp_path / "service", model, devices=1)
    async with training(fleet, JOB, at=20) as (client, handle):
        coordinator, fault = fleet.pids()["coordinator"], time.time()
        (head,) = [p for p in psutil.Process(coordinator).children() if "gcs_server" in p.name()]
        head.kill()
        async with asyncio.timeout(START_SECONDS):
            while not left_with(fleet.problems, 9, "RAY_LOST"):  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.1)
        outcome = await ended(
            client,
            handle,
            undisturbed,
            of=("head", "SIGKILL of the head of a service's own Ray"),
            fault=fault,
            fleet=fleet,
        )
    assert len(fleet.problems) == 1
    accept(outcome)


async def test_a_service_that_is_told_to_stop_lets_its_job_reach_a_checkpoint_first(
    model: Path, tmp_path: Path
) -> None:
    fleet = SoakFleet(tmp_path / "service", model, devices=1)
    async with training(fleet, JOB, at=20) as (client, handle):
        assert await fleet.terminate("coordinator") == 0
        handle = await finish(client, handle.job_id)
        assert (await handle.refresh()).repeated_steps == 0
        told = [event.message async for event in handle.events(follow=False) if event.kind == "job.queued"]
    assert any("since the coordinator stops" in message for message in told)
    assert fleet.problems == []


@pytest.mark.usefixtures("no_token")
async def test_a_service_on_a_cluster_survives_its_head(
    model: Path, tmp_path: Path, undisturbed: Faultless, accept: Accept
) -> None:
    """Head, raylet and base model die at once, as their machine does; both are started again."""
    port = free_port()
    head = RayNode.head(port, resources={"cola_base_model": 1}, log=tmp_path / "head.log")
    try:
        fleet = SoakFleet(
            tmp_path / "service", model, devices=1, ray_address=f"{get_node_ip_address()}:{port}"
        )
        async with training(fleet, JOB, at=20) as (client, handle):
            fault = time.time()
            head.die()
            log = tmp_path / "head again.log"
            head = await asyncio.to_thread(
                lambda: RayNode.head(port, resources={"cola_base_model": 1}, log=log)
            )
            outcome = await ended(
                client,
                handle,
                undisturbed,
                of=("head", "SIGKILL of everything on the head's machine but the coordinator"),
                fault=fault,
                fleet=fleet,
            )
        assert any("coordinator ended by itself" in each for each in fleet.problems), fleet.problems
    finally:
        head.die()
    accept(outcome)


@pytest.mark.usefixtures("no_token")
async def test_the_base_models_node_dies_and_another_takes_its_place(
    model: Path, tmp_path: Path, undisturbed: Faultless, accept: Accept
) -> None:
    with cluster(tmp_path, workers=2) as (address, nodes):
        fleet = SoakFleet(tmp_path / "service", model, devices=1, ray_address=address)
        async with training(fleet, JOB, at=20) as (client, handle):
            (holder,) = [node for node in nodes if node.process("BaseModelActor")]
            fault = time.time()
            holder.die()
            outcome = await ended(
                client,
                handle,
                undisturbed,
                of=("base model", "SIGKILL of its whole Ray node, beside another"),
                fault=fault,
                fleet=fleet,
            )
    assert fleet.problems == []
    accept(outcome)


@pytest.mark.usefixtures("no_token")
async def test_two_base_models_at_once_change_no_step_when_a_raylet_only_hangs(
    model: Path, tmp_path: Path, undisturbed: Faultless, accept: Accept
) -> None:
    """Ray starts the base model elsewhere while the old one still computes, until its raylet wakes up."""
    with cluster(tmp_path, workers=2) as (address, nodes):
        fleet = SoakFleet(tmp_path / "service", model, devices=1, ray_address=address)
        async with training(fleet, JOB, at=20) as (client, handle):
            (holder,) = [node for node in nodes if node.process("BaseModelActor")]
            (other,) = [node for node in nodes[1:] if node is not holder]
            raylet, old = holder.process("raylet"), holder.process("BaseModelActor")
            assert raylet is not None
            assert old is not None
            fault = time.time()
            raylet.suspend()
            async with asyncio.timeout(START_SECONDS):
                while other.process("BaseModelActor") is None:  # noqa: ASYNC110 (another process)
                    await asyncio.sleep(0.1)
            assert old.is_running(), "there were never two"
            assert not (await handle.refresh()).ended, "it came too late"
            await asyncio.sleep(3.0)
            raylet.resume()
            outcome = await ended(
                client,
                handle,
                undisturbed,
                of=("base model", "its raylet SIGSTOPped until there are two of them, then SIGCONT"),
                fault=fault,
                fleet=fleet,
            )
    assert fleet.problems == []
    accept(outcome)
