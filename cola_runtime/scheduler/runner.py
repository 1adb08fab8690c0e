"""All running jobs, of all base models: starts their drivers, steers them, answers questions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cola_runtime.adapters.checkpoint_format import Encoded
from cola_runtime.config import RetentionSettings, SpotCheckSettings
from cola_runtime.errors import ColaError, Conflict
from cola_runtime.gradients.planner import Costs
from cola_runtime.jobs.plan import as_recorded, job_taps, job_workload, stored_spec, training_plan
from cola_runtime.jobs.records import JobRecord, TenantTerms
from cola_runtime.jobs.state import ACTIVE_STATES, TERMINAL_STATES, TRANSITIONS, JobState, Trigger
from cola_runtime.jobs.store import JobStore
from cola_runtime.scheduler.checkpoints import CheckpointShelf
from cola_runtime.scheduler.deadlines import DeadlineWatch
from cola_runtime.scheduler.device_pool import DevicePool, DeviceStatus
from cola_runtime.scheduler.driver import INTERNAL_MESSAGE, JobDriver
from cola_runtime.scheduler.generation import Generation
from cola_runtime.scheduler.job_data import load_job_data
from cola_runtime.scheduler.leases import LeaseBook
from cola_runtime.scheduler.patience import until_available
from cola_runtime.scheduler.ports import BaseModelPort
from cola_runtime.scheduler.primitives import AdapterPrimitives
from cola_runtime.scheduler.quarantine import QuarantineDesk
from cola_runtime.scheduler.replicas import Replica, ReplicaSet, ReplicaStatus
from cola_runtime.scheduler.slots import JobSlots
from cola_runtime.scheduler.spot_checks import SpotChecks
from cola_runtime.scheduler.stops import AT_COORDINATORS_END, AT_REQUEST, Stop
from cola_runtime.scheduler.trace_desk import TraceDesk
from cola_runtime.scheduler.waiting import Share
from cola_runtime.storage.objects import ObjectStorage
from cola_runtime.trace.spans import SpanRecorder
from cola_runtime.types import BaseModelDescription, Lease

logger = logging.getLogger(__name__)

STOP_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceStatistics:
    uptime_seconds: float
    base_busy_seconds: float  # of all replicas together
    base_steps: int
    replicas: tuple[ReplicaStatus, ...] = ()  # of all base models


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedBaseModel:
    """One base model: its replicas, and what the encodings of its jobs' taps are planned by."""

    replicas: ReplicaSet
    costs: Costs

    @property
    def description(self) -> BaseModelDescription:
        return self.replicas.description


class JobRunner:
    """Owns the base models' scheduler loops, the device pool and the job drivers."""

    def __init__(
        self,
        *,
        base_models: Mapping[str, ServedBaseModel],
        pool: DevicePool,
        book: LeaseBook,
        store: JobStore,
        storage: ObjectStorage,
        spans: SpanRecorder,
        retention: RetentionSettings,
        spot_checks: SpotCheckSettings,
    ) -> None:
        self._base_models = dict(base_models)
        self.spans = spans
        self.trace = TraceDesk(spans, bases=self._replicas, pool=pool)
        self._pool = pool
        self._book, self._store, self._storage = book, store, storage
        self.checkpoints = CheckpointShelf(
            book=book, store=store, storage=storage, spans=spans, retention=retention
        )
        self.quarantine = QuarantineDesk(pool=pool, book=book, store=store)
        self._checks = SpotChecks(
            spot_checks,
            pool=pool,
            book=book,
            store=store,
            desk=self.quarantine,
            read=self.checkpoints.read_shard,
        )
        self.checkpoints.to_check = self._checks.to_check
        self.checkpoints.on_recorded, self.checkpoints.needed = self._checks.recorded, self._checks.needed
        pool.on_checkpoint, pool.on_dismissed = self._take_checkpoint, self._dismiss_device
        pool.on_fault = self.quarantine.strike
        for served in self._base_models.values():
            served.replicas.on_fault = self.quarantine.strike
        self._primitives = {
            name: AdapterPrimitives(
                replicas=served.replicas,
                pool=pool,
                book=book,
                store=store,
                checkpoints=self.checkpoints,
                checks=self._checks,
            )
            for name, served in self._base_models.items()
        }
        self.generation = Generation(
            {name: served.replicas for name, served in self._base_models.items()},
            book=book,
            store=store,
            storage=storage,
        )
        self._slots = JobSlots()
        self._drivers: dict[str, JobDriver] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._background: list[asyncio.Task[None]] = []
        self._deadlines = DeadlineWatch(store, cancel=self._cancel_late)
        self._draining = False
        self._started = time.monotonic()

    async def requeue_running(self) -> None:
        """Of the last coordinator. Before anybody can submit: what runs afterwards runs here."""
        for record in await self._store.all_jobs(JobState.RUNNING):
            await self._store.transition(record.job_id, Trigger.REQUEUE, message="the coordinator restarted")

    async def open(self) -> None:
        """Start the loops and take up every job that had not ended when the last coordinator stopped."""
        self._background = [
            asyncio.create_task(self._pool.watch_forever(), name="device-watch"),
            *(
                asyncio.create_task(served.replicas.run_forever(), name=f"replicas of {name}")
                for name, served in self._base_models.items()
            ),
        ]
        await self._take_up_checks()
        for record in await self._store.all_jobs(JobState.QUEUED):
            await self.start(record.job_id)
        for record in await self._store.all_jobs(JobState.PAUSED):
            self._deadlines.watch(record)

    async def _take_up_checks(self) -> None:
        """Those that the last coordinator did not get to; of a base model that is not served they wait."""
        for check in await self._store.checkpoints.pending_checks():
            record = await self._store.job(check.job_id)
            served = self._base_models.get(record.base_model)
            if served is None:
                continue
            replica = served.replicas.named(check.replica)
            try:
                plan = training_plan(stored_spec(record), served.description, total_steps=record.total_steps)
            except ColaError as error:
                logger.warning("not checked: %s", error, extra={"event": "spot_check.not_taken_up"})
                await self._store.checkpoints.forget_check(check)
            else:
                self._checks.take_up(check, plan, replica)

    async def close(self) -> None:
        """Stop driving: jobs stay as they are recorded and go on at the next `open`."""
        self._pool.closing = True
        self._deadlines.close()
        self._checks.close()
        tasks = [*self._tasks.values(), *self._background]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def drain(self, *, timeout_seconds: float) -> None:
        """Stop every job at its next step boundary, with a checkpoint; what begins now waits for `open`."""
        self._draining = True
        for driver in self._drivers.values():
            driver.stop.ask(Stop.DRAIN, why=AT_COORDINATORS_END)
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=timeout_seconds)

    async def start(self, job_id: str) -> None:
        """Begin or go on with a job; nothing happens when it already runs or has ended."""
        record = await self._store.job(job_id)
        if self._draining or job_id in self._tasks or record.state in TERMINAL_STATES:
            return
        self._deadlines.watch(record)
        if record.base_model not in self._base_models:
            return  # an earlier service had it: the job stays queued until one has it again
        self._tasks[job_id] = asyncio.create_task(self._drive(record), name=job_id)

    async def cancel(self, job_id: str) -> None:
        """Cancelled at the next step boundary; a job that is not running is cancelled at once."""
        await self._stop(job_id, Stop.CANCEL)

    async def pause(self, job_id: str) -> None:
        await self._stop(job_id, Stop.PAUSE)

    async def resume(self, job_id: str) -> None:
        """Go on from the last checkpoint; a pause that has not taken effect yet is withdrawn."""
        driver = self._drivers.get(job_id)
        if driver is not None and driver.stop.withdraw_pause():
            return
        if job_id in self._tasks:
            await asyncio.wait({self._tasks[job_id]}, timeout=STOP_TIMEOUT_SECONDS)
        record = await self._store.job(job_id)
        if record.state in TERMINAL_STATES:
            raise Conflict("JOB_ENDED", f"the job is {record.state}; only a paused job can be resumed")
        if record.state is JobState.PAUSED:
            await self._store.transition(job_id, Trigger.RESUME, message="resumed at its tenant's request")
        await self.start(job_id)

    async def retire(self, job_id: str) -> None:
        """Delete what of the job's checkpoints need not be kept."""
        await self.checkpoints.retire(job_id)

    def set_terms(self, tenant_id: str, terms: TenantTerms) -> None:
        """What the tenant is entitled to from now on."""
        share = Share(weight=terms.weight, tokens_per_minute=terms.tokens_per_minute)
        for served in self._base_models.values():
            served.replicas.set_share(tenant_id, share)
        self._slots.set_limit(tenant_id, terms.concurrent_jobs)

    def waiting_reason(self, job: JobRecord) -> str:
        """Which cap, device, gang, place in the fair order or deadline the job waits for; else what it is
        doing; "" while it is in a base step.
        """
        if not self._background:
            return "the service is starting: jobs go on when its devices are there"
        if job.base_model not in self._base_models:
            return f"base model {job.base_model} is not served now; the job goes on when it is again"
        waits = self._slots.waiting_reason(job.tenant_id, job.job_id)
        replica = self._replica(job)
        if waits is None and replica is not None and replica.loop.computes(job.job_id):
            return ""
        queued = None if replica is None else replica.loop.waiting_reason(job.job_id)
        return waits or queued or self._doing(job)

    def replica(self, job: JobRecord) -> str:
        """Which replica of its base model computes the job's rows; "" if none does now."""
        replica = self._replica(job)
        return "" if replica is None else replica.name

    def _doing(self, job: JobRecord) -> str:
        driver, lease = self._drivers.get(job.job_id), self._book.current(job.job_id)
        if driver is None:
            return "waiting for its data to be read"
        if not driver.leases:
            return driver.phase
        if lease is not None:
            return f"{lease.devices} builds or restores its adapter"
        if not self._base_models[job.base_model].replicas.ready:
            return f"no replica of base model {job.base_model} answers; the job goes on when one does"
        return ": ".join(filter(None, (driver.phase, self._pool.choice.unable(job.job_id))))

    def devices(self) -> list[DeviceStatus]:
        return self._pool.statuses()

    def statistics(self) -> ServiceStatistics:
        statuses = [status for served in self._base_models.values() for status in served.replicas.statuses()]
        return ServiceStatistics(
            uptime_seconds=time.monotonic() - self._started,
            base_busy_seconds=sum(status.base_busy_seconds for status in statuses),
            base_steps=sum(status.base_steps for status in statuses),
            replicas=tuple(statuses),
        )

    def seconds_per_token(self, base_model: str) -> float | None:
        """Of the base model's base steps so far; None before the first."""
        return self._base_models[base_model].replicas.seconds_per_token

    def _replicas(self) -> dict[str, BaseModelPort]:
        """All that answer, of all base models."""
        every = [replica for served in self._base_models.values() for replica in served.replicas.all]
        return {replica.name: replica.base for replica in every if replica.ready}

    def _replica(self, job: JobRecord) -> Replica | None:
        served = self._base_models.get(job.base_model)
        return None if served is None else served.replicas.of(job.job_id)

    async def _drive(self, record: JobRecord) -> None:
        try:
            driver = await until_available(lambda: self._driver(record))
            self._drivers[record.job_id] = driver  # who asks from here on to stop it asks the driver
            if self._draining:
                driver.stop.ask(Stop.DRAIN, why=AT_COORDINATORS_END)
            if (await until_available(lambda: self._store.job(record.job_id))).state in ACTIVE_STATES:
                await driver.run()
        except ColaError as error:
            await self._fail(record.job_id, error.reason, str(error))
        except Exception:
            logger.exception(
                "job could not start", extra={"event": "job.internal_error", "job_id": record.job_id}
            )
            await self._fail(record.job_id, "INTERNAL", INTERNAL_MESSAGE)
        finally:
            self._base_models[record.base_model].replicas.leave(record.job_id)
            self._drivers.pop(record.job_id, None)
            self._tasks.pop(record.job_id, None)

    async def _driver(self, record: JobRecord) -> JobDriver:
        spec, served = stored_spec(record), self._base_models[record.base_model]
        description = served.replicas.description
        plan = training_plan(spec, description, total_steps=record.total_steps)
        self.set_terms(record.tenant_id, await self._store.accounts.terms(record.tenant_id))
        data = await load_job_data(record, spec, description, self._storage)
        asked = as_recorded(spec, record.encoding)
        taps, _ = job_taps(asked, description, plan.adapter, data.size, served.costs)
        workload = job_workload(asked, description, data.size, served.costs)
        return JobDriver(
            record,
            plan=replace(plan, taps=taps, step_tokens=workload.step_tokens),
            data=data,
            primitives=self._primitives[record.base_model],
            store=self._store,
            slots=self._slots,
            spans=self.spans,
        )

    async def _fail(self, job_id: str, reason: str, message: str) -> None:
        await until_available(
            lambda: self._store.transition(
                job_id, Trigger.FAIL, message=message, failure_reason=reason, failure_message=message
            )
        )

    async def _cancel_late(self, job_id: str) -> None:
        await self._stop(job_id, Stop.CANCEL, why="since its deadline has passed")

    async def _stop(self, job_id: str, stop: Stop, *, why: str = AT_REQUEST) -> None:
        record = await self._store.job(job_id)
        if stop.trigger not in TRANSITIONS[record.state]:
            return  # it has ended, or is paused already
        driver = self._drivers.get(job_id)
        if driver is not None:
            driver.stop.ask(stop, why=why)
        else:
            await self._store.transition(job_id, stop.trigger, message=stop.told(why))

    async def _take_checkpoint(self, lease: Lease, version: int, content: Encoded, sha256: str) -> None:
        if not self._checks.arrived(lease, content):
            await self.checkpoints.store(lease, version, content, sha256)

    async def _dismiss_device(self, device_id: str) -> None:
        """Its streams end at every replica of every base model."""
        await asyncio.gather(*(served.replicas.dismiss(device_id) for served in self._base_models.values()))
