"""The tenants of a soak: they submit, pause, resume and cancel at random, and compare what comes of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.client.values import Job
from cola_runtime.errors import ColaError, Conflict, Unavailable
from cola_runtime.testing.soak_fleet import Fleet
from cola_runtime.testing.soak_jobs import (
    MIXED_BOUND,
    Expected,
    SoakJob,
    checkpoint_bytes,
    largest_difference,
    optimizer_steps,
)
from cola_runtime.testing.soak_ledger import JobLedger

LOOK_SECONDS = 0.5
SUBMIT_SECONDS = 120.0
EXPORT_ONE_IN = 4  # of the completed jobs: also by the SDK's download
PAUSE, CANCEL = 0.12, 0.03  # of a tenant's turns


@dataclass(slots=True)
class Found:
    """What the comparisons at the jobs' ends gave."""

    completed: int = 0
    cancelled: int = 0
    steps: int = 0
    repeated_steps: int = 0
    leases: int = 0
    checkpoints_loaded: int = 0
    exported: int = 0
    bit_identical: int = 0
    fixed: int = 0  # completed jobs whose bits must be the same
    largest_difference: float = 0.0
    violations: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Tenants:
    """Drives and watches every tenant's jobs. Belongs to one event loop."""

    fleet: Fleet
    jobs: Sequence[SoakJob]
    expected: Mapping[str, Expected]
    seed: int
    active_each: int
    ledgers: dict[str, JobLedger] = field(default_factory=dict)
    found: Found = field(default_factory=Found)
    driving: bool = True
    clients: dict[str, AsyncClient] = field(default_factory=dict)
    _handles: dict[str, AsyncJobHandle] = field(default_factory=dict)
    _loaded: set[tuple[str, int, str]] = field(default_factory=set)
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def open(self, names: Sequence[str]) -> None:
        """A key for each tenant, by the operator's."""
        async with self.fleet.client(self.fleet.first_key) as operator:
            for name in names:
                key = (await operator.create_key(name)).key
                self.clients[name] = await self._stack.enter_async_context(self.fleet.client(key))

    async def close(self) -> None:
        await self._stack.aclose()

    @property
    def violations(self) -> list[str]:
        of_jobs = [wrong for ledger in self.ledgers.values() for wrong in ledger.violations]
        return [*of_jobs, *self.found.violations]

    def active(self) -> list[JobLedger]:
        return [ledger for ledger in self.ledgers.values() if ledger.active]

    def unfinished(self) -> list[JobLedger]:
        return [ledger for ledger in self.ledgers.values() if not ledger.final]

    async def drive(self, tenant: str) -> None:
        """Keep some jobs going, and meddle with them."""
        drawn = random.Random(f"{self.seed} {tenant}")  # noqa: S311 (repeatable, guards nothing)
        submitted, mine = 0, list[str]()
        while self.driving:
            mine = [job_id for job_id in mine if not self.ledgers[job_id].ended]
            if len(mine) < self.active_each:
                submitted += 1
                key = f"{self.seed}-{tenant}-{submitted}"
                mine.append(await self.submit(tenant, drawn.choice(self.jobs), key=key))
            else:
                await self._meddle(drawn, drawn.choice(mine))
            await asyncio.sleep(drawn.uniform(0.2, 1.5))

    async def submit(self, tenant: str, job: SoakJob, *, key: str) -> str:
        """However often the coordinator dies of it, it is one job: the request is the same each time."""
        async with asyncio.timeout(SUBMIT_SECONDS):
            while True:
                try:
                    handle = await self.clients[tenant].submit(
                        job.spec, training=job.training, evaluation=job.evaluation, idempotency_key=key
                    )
                    break
                except Unavailable:
                    await asyncio.sleep(LOOK_SECONDS)
        self._handles[handle.job_id] = handle
        self.ledgers[handle.job_id] = JobLedger(handle.job_id, job)
        return handle.job_id

    async def _meddle(self, drawn: random.Random, job_id: str) -> None:
        turn, wait = drawn.random(), drawn.uniform(0.5, 4.0)
        handle = self._handles[job_id]
        try:
            if turn < CANCEL:
                await handle.cancel()
            elif turn < CANCEL + PAUSE:
                await handle.pause()
                await asyncio.sleep(wait)
                await handle.resume()
            elif self.ledgers[job_id].state == "paused":
                await handle.resume()
        except (Unavailable, Conflict):
            return  # it has ended meanwhile, or the service is away

    async def resume_all(self) -> None:
        """So that everything that is left comes to its end."""
        for ledger in self.unfinished():
            if ledger.state == "paused":
                try:
                    await self._handles[ledger.job_id].resume()
                except (Unavailable, Conflict):
                    continue

    async def watch(self) -> None:
        """Replay every job's events as they come, load every checkpoint, and check what has ended."""
        while True:
            for ledger in self.unfinished():
                try:
                    await self._look(ledger)
                except (ColaError, TimeoutError) as error:
                    if not isinstance(error, Unavailable):
                        self.found.violations.append(f"{ledger.job_id}: asking for it gave {error}")
                    await asyncio.sleep(LOOK_SECONDS)
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self, ledger: JobLedger) -> None:
        handle = self._handles[ledger.job_id]
        job = await handle.refresh()  # first: the events then hold at least what it says
        ledger.see(job)
        async for event in handle.events(after=ledger.last_event, follow=False):
            ledger.hear(event)
        await self._load_checkpoints(handle)
        if job.ended:
            await self._check_end(ledger, job)
            ledger.final = True
        else:
            ledger.check_record(await handle.metrics())

    async def _load_checkpoints(self, handle: AsyncJobHandle) -> None:
        """Whichever can be seen can be loaded; one that cannot must have been retired since."""
        for made in await handle.checkpoints():
            named = (handle.job_id, made.version, made.sha256)
            if named in self._loaded:
                continue
            content = await self._content(handle.job_id, made.version, made.sha256)
            if content is None:
                if any(now.sha256 == made.sha256 for now in await handle.checkpoints()):
                    wrong = f"{handle.job_id}: checkpoint {made.version} is listed and cannot be loaded"
                    self.found.violations.append(wrong)
                continue
            optimizer_steps(content)  # decodes all of it
            self._loaded.add(named)
            self.found.checkpoints_loaded += 1

    async def _content(self, job_id: str, version: int, sha256: str) -> bytes | None:
        data_dir = self.fleet.data_dir
        return await asyncio.to_thread(checkpoint_bytes, data_dir, job_id, version=version, sha256=sha256)

    async def _check_end(self, ledger: JobLedger, job: Job) -> None:
        handle, found = self._handles[ledger.job_id], self.found
        steps = await handle.metrics()
        ledger.check_account(job, steps)
        found.steps += len(steps)
        found.repeated_steps += job.repeated_steps
        found.leases += ledger.leases
        if job.state != "succeeded":
            found.cancelled += job.state == "cancelled"
            return
        found.completed += 1
        expected = self.expected[ledger.kind.name]
        ledger.check_completed(job, steps, expected)
        last = (await handle.checkpoints())[-1]
        content = await self._content(ledger.job_id, last.version, last.sha256)
        if content is None or last.version != len(expected.losses):
            ledger.violations.append(f"{ledger.job_id}: its last checkpoint is of step {last.version}")
            return
        self._compare(ledger, content, expected)
        if found.completed % EXPORT_ONE_IN == 0:
            await self._export(handle)

    def _compare(self, ledger: JobLedger, content: bytes, expected: Expected) -> None:
        found, same = self.found, content == expected.checkpoint
        found.fixed += ledger.kind.fixed
        found.bit_identical += same
        difference = largest_difference(content, expected.checkpoint)
        found.largest_difference = max(found.largest_difference, difference)
        if optimizer_steps(content) != expected.optimizer_steps:
            wrong = f"its optimizer has stepped {optimizer_steps(content)} times"
            ledger.violations.append(f"{ledger.job_id}: {wrong}, not {expected.optimizer_steps}")
        if (ledger.kind.fixed and not same) or difference > MIXED_BOUND:
            wrong = f"its adapter differs by {difference:.3g} from that of the run without faults"
            ledger.violations.append(f"{ledger.job_id} ({ledger.kind.name}): {wrong}")

    async def _export(self, handle: AsyncJobHandle) -> None:
        exports = self.fleet.data_dir.with_name("exports")
        folder = await handle.download_adapter(exports / handle.job_id)
        self.found.exported += any(await asyncio.to_thread(lambda: list(folder.iterdir())))

    async def check_usage(self) -> None:
        """What a tenant is charged for is what its jobs' records say."""
        for tenant, client in self.clients.items():
            usage, jobs = await client.usage(), await client.jobs()
            told = (usage.jobs, usage.steps, usage.tokens, usage.repeated_steps)
            mine = (
                len(jobs),
                sum(job.version for job in jobs),
                sum(job.tokens for job in jobs),
                sum(job.repeated_steps for job in jobs),
            )
            if told != mine:
                self.found.violations.append(f"{tenant} is charged {told}, and its jobs have {mine}")
