"""The job store: the truth about tenants, keys, jobs, leases, steps, evaluations and events.

`checkpoints`, `accounts`, `devices` and `audit` are doors to what else is in it. Every method is one
transaction; a change of a job's state and its event are durable together or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection

from cola_runtime import clock
from cola_runtime.errors import Unavailable
from cola_runtime.jobs import evaluations, job_rows, progress, tenancy, trail
from cola_runtime.jobs.accounts import Accounts
from cola_runtime.jobs.audit import AuditTrail
from cola_runtime.jobs.checkpoint_book import CheckpointBook
from cola_runtime.jobs.database import Database
from cola_runtime.jobs.hold import store_id as read_store_id
from cola_runtime.jobs.job_writes import JobWrites
from cola_runtime.jobs.recall import Memory
from cola_runtime.jobs.records import (
    ApiKey,
    EvaluationRecord,
    EventRecord,
    JobRecord,
    NewJob,
    StepRecord,
    Tenant,
)
from cola_runtime.jobs.registry import DeviceRegistry
from cola_runtime.jobs.state import JobState, Trigger
from cola_runtime.jobs.watch import JobWatch
from cola_runtime.types import Lease
from cola_runtime.update_chain import RecordedLink

ALL_SCOPES = "*"


class JobStore:
    """Owns the database. Writes happen in one thread, in the order they were asked for."""

    def __init__(self, database: Database, *, now: clock.Clock = clock.now) -> None:
        self._database, self._now = database, now
        self.devices = DeviceRegistry(database, now)
        self.audit = AuditTrail(database, now)
        self.memory = Memory()
        self._writes = JobWrites(database, self.memory, at=self._at)
        self.accounts = Accounts(database)
        self.checkpoints = CheckpointBook(self._writes)

    @classmethod
    async def open(cls, url: str, *, now: clock.Clock = clock.now) -> JobStore:
        """Open `sqlite:///path` (or PostgreSQL), creating and migrating tables. Raises Unavailable."""
        database = Database(url)
        async with contextlib.AsyncExitStack() as unless_opened:
            unless_opened.push_async_callback(database.close)
            await database.open()
            unless_opened.pop_all()
        return cls(database, now=now)

    async def close(self) -> None:
        """Nothing that was begun is lost, of audit entries as many as `AuditTrail.flush` waits for."""
        await self.audit.flush()
        await self._database.close()

    async def taken_over(self) -> None:
        """Wait until another coordinator has the store: this one can write no more."""
        await asyncio.shield(asyncio.wrap_future(self._database.taken_over))

    @property
    def outage(self) -> Unavailable | None:
        """Why the database was of no use when it was last asked; None while it is."""
        return self._database.outage

    async def store_id(self) -> str:
        """Which job store this is, whatever its address."""
        return await self._database.run(read_store_id)

    # Tenants and keys

    async def create_tenant(self, name: str) -> Tenant:
        return await self._database.run(lambda c: tenancy.insert_tenant(c, name, at=self._at()))

    async def tenants(self) -> list[Tenant]:
        return await self._database.run(tenancy.read_tenants)

    async def create_key(
        self, tenant_name: str, *, scopes: Iterable[str] = (ALL_SCOPES,), expires_in: timedelta | None = None
    ) -> str:
        """A new key for the tenant, in the clear for the only time."""
        wanted, now = frozenset(scopes), self._now()
        ends = None if expires_in is None else clock.rfc3339(now + expires_in)
        return await self._database.run(
            lambda c: tenancy.insert_key(
                c, tenant_name, scopes=wanted, expires_at=ends, at=clock.rfc3339(now)
            )
        )

    async def keys(self) -> list[ApiKey]:
        return await self._database.run(tenancy.read_keys)

    async def revoke_key(self, key_id: str) -> None:
        self.memory.forget_key(key_id)  # whatever comes of the rest
        await self._database.run(lambda c: tenancy.mark_key_revoked(c, key_id, at=self._at()))
        self.memory.forget_key(key_id)  # who asked in between found it valid still

    def remembered_key(self, key: str) -> ApiKey | None:
        """What `authenticate` said of the key a short time ago, unless it has expired meanwhile."""
        found = self.memory.key(key)
        return None if found is None or tenancy.has_expired(found, self._at()) else found

    async def authenticate(self, key: str) -> ApiKey | None:
        """The key's tenant and scopes; None for an unknown, revoked or expired key."""
        at = self._at()
        found = await self._database.run(lambda c: tenancy.find_key(c, key, at=at))
        self.memory.note_key(key, found)
        if found is not None and tenancy.is_stale(found.last_used_at, at):
            with contextlib.suppress(Unavailable):  # a full disk must keep nobody from reading
                await self._database.run(lambda c: tenancy.note_use(c, found, at=at))
        return found

    async def tenant_of_key(self, key: str) -> Tenant | None:
        """As `authenticate`, for who needs no scopes."""

        def find(connection: Connection) -> Tenant | None:
            found = tenancy.find_key(connection, key, at=self._at())
            return None if found is None else tenancy.read_tenant(connection, found.tenant_id)

        return await self._database.run(find)

    # Jobs

    async def create_job(self, new: NewJob) -> JobRecord:
        """The queued job. Its id differs from `new.job_id` if the idempotency key made it earlier.

        Raises Conflict `IDEMPOTENCY_CONFLICT`.
        """
        return await self._writes.run("job", new.job_id, lambda c: job_rows.insert_job(c, new, at=self._at()))

    async def job(self, job_id: str, *, tenant_id: str | None = None) -> JobRecord:
        """Raises NotFound `JOB_UNKNOWN`, also when the job is another tenant's."""
        return await self._noted(lambda c: job_rows.read_job(c, job_id, tenant_id=tenant_id))

    async def find_job(self, tenant_id: str, ref: str) -> JobRecord:
        """By full id, unique name or unique prefix. Raises NotFound, Conflict `REFERENCE_AMBIGUOUS`."""
        return await self._noted(lambda c: job_rows.find_job(c, tenant_id, ref))

    async def jobs(
        self,
        *,
        tenant_id: str | None = None,
        states: Collection[JobState] | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> list[JobRecord]:
        """Newest first; `after` is the job id of the last one seen."""
        found = await self._database.run(
            lambda c: job_rows.list_jobs(c, tenant_id=tenant_id, states=states, limit=limit, after=after)
        )
        self.memory.note_jobs(found)
        return found

    async def all_jobs(self, state: JobState) -> list[JobRecord]:
        """Oldest first, of every tenant, however many there are."""
        found: list[JobRecord] = []
        while page := await self.jobs(
            states=[state], limit=job_rows.MAX_LISTED_JOBS, after=found[-1].job_id if found else None
        ):
            found += page
        return found[::-1]

    async def active_jobs(self, tenant_id: str, *, but_key: str = "") -> int | None:
        """How many of the tenant's jobs have not ended; None where `but_key` made one of its jobs."""
        return await self._database.run(lambda c: job_rows.count_active(c, tenant_id, but_key=but_key))

    async def transition(
        self,
        job_id: str,
        trigger: Trigger,
        *,
        message: str = "",
        failure_reason: str | None = None,
        failure_message: str | None = None,
    ) -> JobRecord:
        """What `trigger` makes of the job; every state but running ends its lease, so record steps before.

        Raises Conflict `TRANSITION_ILLEGAL`; its `actual` is the state that the job is in.
        """
        return await self._writes.run(
            "transition",
            job_id,
            lambda c: job_rows.move_job(
                c,
                job_id,
                trigger,
                at=self._at(),
                message=message,
                failure_reason=failure_reason,
                failure_message=failure_message,
            ),
        )

    async def stop_early(self, job_id: str, message: str, *, data: Mapping[str, Any]) -> JobRecord:
        """The job has succeeded before its last step: event `job.stopped_early`, then as `transition`."""

        def stop(connection: Connection) -> JobRecord:
            at = self._at()
            trail.append_event(
                connection, job_id, at=at, kind="job.stopped_early", message=message, data=data
            )
            return job_rows.move_job(connection, job_id, Trigger.STOP_EARLY, at=at, message=message)

        return await self._writes.run("transition", job_id, stop)

    async def miss_deadline(self, job_id: str) -> JobRecord | None:
        """Note, once, that the job has not ended by its deadline; None if it has, or was noted before."""
        return await self._writes.run(
            "event", job_id, lambda c: job_rows.miss_deadline(c, job_id, at=self._at())
        )

    # Leases, steps, evaluations

    async def grant_lease(self, job_id: str, *device_ids: str, replica: str = "") -> Lease:
        """A lease with the next epoch, of one device a shard; whoever holds an earlier one is fenced.

        The job's trail says which `replica` of its base model computes its rows.

        Raises Conflict `JOB_NOT_ACTIVE`.
        """
        return await self._writes.run(
            "lease",
            job_id,
            lambda c: progress.open_lease(c, job_id, device_ids, replica=replica, at=self._at()),
        )

    async def rewind(self, lease: Lease, version: int) -> JobRecord:
        """Steps, evaluations and checkpoints above `version` leave the record; what was spent stays spent."""
        return await self._writes.run(
            "rewind", lease.job_id, lambda c: progress.rewind_job(c, lease, version, at=self._at())
        )

    async def record_step(self, step: StepRecord) -> JobRecord:
        """Record step `version + 1` of the current lease, once; the same step again changes nothing.

        Raises Fenced, Conflict `STEP_OUT_OF_ORDER`, `STEP_REUSED`, `JOB_NOT_RUNNING`.
        """
        return await self._writes.run(
            "step", step.job_id, lambda c: progress.insert_step(c, step, at=self._at())
        )

    async def record_evaluation(self, evaluation: EvaluationRecord) -> EvaluationRecord:
        """Record the evaluation of the job's version, once; the same version again changes nothing.

        Raises Fenced, InvalidInput `METRIC_NOT_FINITE`, Conflict `EVALUATION_OUT_OF_ORDER`.
        """
        return await self._writes.run(
            "evaluation",
            evaluation.job_id,
            lambda c: evaluations.insert_evaluation(c, evaluation, at=self._at()),
        )

    async def steps(self, job_id: str, *, after: int = 0, limit: int = 1000) -> list[StepRecord]:
        return await self._database.run(lambda c: progress.read_steps(c, job_id, after=after, limit=limit))

    async def links(self, job_id: str, version: int) -> tuple[RecordedLink, ...]:
        """Of the version in the update chain, by shard; none of version 0."""
        return await self._database.run(lambda c: progress.read_links(c, job_id, version))

    async def evaluations(
        self, job_id: str, *, after: int = -1, limit: int | None = None
    ) -> list[EvaluationRecord]:
        """Those of steps above `after`, in order."""
        return await self._database.run(
            lambda c: evaluations.read_evaluations(c, job_id, after=after, limit=limit)
        )

    async def best_evaluation(self, job_id: str) -> EvaluationRecord | None:
        return await self._database.run(lambda c: evaluations.find_best(c, job_id))

    # Events

    async def add_event(
        self,
        job_id: str,
        kind: str,
        message: str,
        *,
        data: Mapping[str, Any] | None = None,
        level: str = "info",
    ) -> EventRecord:
        """Add to the history something that changed no state. Raises NotFound `JOB_UNKNOWN`."""

        def add(connection: Connection) -> EventRecord:
            job_rows.read_job(connection, job_id)
            return trail.append_event(
                connection, job_id, at=self._at(), kind=kind, message=message, data=data, level=level
            )

        return await self._writes.run("event", job_id, add)

    async def events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> list[EventRecord]:
        return await self._database.run(lambda c: trail.read_events(c, job_id, after=after, limit=limit))

    def watch(self, job_id: str, *, after: int = 0, page: int = 1000) -> JobWatch:
        """To be told of the job's events above id `after`, at most `page` at once."""
        return JobWatch(job_id, self._database, self._writes.next_commit, after=after, page=page)

    def _at(self) -> str:
        return clock.rfc3339(self._now())

    async def _noted(self, work: Callable[[Connection], JobRecord]) -> JobRecord:
        job = await self._database.run(work)
        self.memory.note_jobs([job])
        return job
