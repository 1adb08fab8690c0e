"""All running jobs: starts their drivers, hears what base model and devices report, answers questions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from pydantic import ValidationError

from cola_runtime.config import RetentionSettings, SpotCheckSettings
from cola_runtime.errors import ColaError, Conflict, InvalidInput
from cola_runtime.gradients.planner import Costs
from cola_runtime.jobs.plan import as_recorded, job_taps, training_plan
from cola_runtime.jobs.records import JobRecord, TenantTerms
from cola_runtime.jobs.state import ACTIVE_STATES, TERMINAL_STATES, TRANSITIONS, JobState, Trigger
from cola_runtime.jobs.store import JobStore
from cola_runtime.scheduler.checkpoints import CheckpointShelf, read_checkpoint
from cola_runtime.scheduler.deadlines import DeadlineWatch
from cola_runtime.scheduler.device_pool import DevicePool, DeviceStatus
from cola_runtime.scheduler.driver import AT_COORDINATORS_END, AT_REQUEST, INTERNAL_MESSAGE, JobDriver, Stop
from cola_runtime.scheduler.job_data import load_job_data
from cola_runtime.scheduler.leases import LeaseBook
from cola_runtime.scheduler.loop import SchedulerLoop
from cola_runtime.scheduler.patience import until_available
from cola_runtime.scheduler.ports import BaseModelPort
from cola_runtime.scheduler.primitives import AdapterPrimitives
from cola_runtime.scheduler.quarantine import QuarantineDesk
from cola_runtime.scheduler.slots import JobSlots
from cola_runtime.scheduler.spot_checks import SpotChecks
from cola_runtime.scheduler.trace_desk import TraceDesk
from cola_runtime.scheduler.waiting import Share
from cola_runtime.spec import JobSpec
from cola_runtime.storage.objects import ObjectStorage
from cola_runtime.trace.spans import SpanRecorder
from cola_runtime.types import (
    BaseEvent,
    BaseModelDescription,
    DeviceLinkChanged,
    Lease,
    StepApplied,
    StepRefused,
)

logger = logging.getLogger(__name__)

BASE_RETRY_SECONDS = 0.5
STOP_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceStatistics:
    uptime_seconds: float
    base_busy_seconds: float
    base_steps: int
    tokens: int  # that they computed, without padding

    @property
    def seconds_per_token(self) -> float | None:
        """Of the base steps so far; None before the first."""
        return self.base_busy_seconds / self.tokens if self.tokens else None


class JobRunner:
    """Owns one base model's scheduler loop, device pool and job drivers."""

    def __init__(
        self,
        *,
        base: BaseModelPort,
        description: BaseModelDescription,
        loop: SchedulerLoop,
        pool: DevicePool,
        book: LeaseBook,
        store: JobStore,
        storage: ObjectStorage,
        costs: Costs,
        spans: SpanRecorder,
        retention: RetentionSettings,
        spot_checks: SpotCheckSettings,
    ) -> None:
        self._costs = costs
        self.spans = spans
        self.trace = TraceDesk(spans, base=base, pool=pool)
        self._base, self._description, self._loop, self._pool = base, description, loop, pool
        self._book, self._store, self._storage = book, store, storage
        self.checkpoints = CheckpointShelf(
            book=book, store=store, storage=storage, spans=spans, retention=retention
        )
        self.quarantine = QuarantineDesk(pool=pool, book=book, store=store)
        self._checks = SpotChecks(
            spot_checks,
            base=base,
            pool=pool,
            book=book,
            store=store,
            desk=self.quarantine,
            read=partial(read_checkpoint, storage),
        )
        self.checkpoints.on_recorded, self.checkpoints.needed = self._checks.recorded, self._checks.needed
        pool.on_checkpoint, pool.on_dismissed = self._take_checkpoint, base.dismiss_device
        pool.on_fault = self.quarantine.strike
        self._primitives = AdapterPrimitives(
            base=base,
            loop=loop,
            pool=pool,
            book=book,
            store=store,
            checkpoints=self.checkpoints,
            checks=self._checks,
        )
        self._slots = JobSlots()
        self._drivers: dict[str, JobDriver] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._background: list[asyncio.Task[None]] = []
        self._deadlines = DeadlineWatch(store, cancel=self._cancel_late)
        self._draining = False
        self._started = time.monotonic()

    async def open(self) -> None:
        """Start the loops and take up every job that had not ended when the last coordinator stopped."""
        self._background = [
            asyncio.create_task(self._loop.run_forever(), name="scheduler"),
            asyncio.create_task(self._pool.watch_forever(), name="device-watch"),
            asyncio.create_task(self._hear_base_forever(), name="base-events"),
        ]
        for record in await self._store.jobs(states=[JobState.RUNNING], limit=100_000):
            await self._store.transition(record.job_id, Trigger.REQUEUE, message="the coordinator restarted")
        for record in await self._store.jobs(states=[JobState.QUEUED], limit=100_000):
            await self.start(record.job_id)
        for record in await self._store.jobs(states=[JobState.PAUSED], limit=100_000):
            self._deadlines.watch(record)

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
            driver.ask(Stop.DRAIN, why=AT_COORDINATORS_END)
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=timeout_seconds)

    async def start(self, job_id: str) -> None:
        """Begin or go on with a job; nothing happens when it already runs or has ended."""
        record = await self._store.job(job_id)
        if self._draining or job_id in self._tasks or record.state in TERMINAL_STATES:
            return
        self._deadlines.watch(record)
        self._tasks[job_id] = asyncio.create_task(self._drive(record), name=job_id)

    async def cancel(self, job_id: str) -> None:
        """Cancelled at the next step boundary; a job that is not running is cancelled at once."""
        await self._stop(job_id, Stop.CANCEL)

    async def pause(self, job_id: str) -> None:
        await self._stop(job_id, Stop.PAUSE)

    async def resume(self, job_id: str) -> None:
        """Go on from the last checkpoint; a pause that has not taken effect yet is withdrawn."""
        driver = self._drivers.get(job_id)
        if driver is not None and driver.withdraw_pause():
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
        self._loop.set_share(tenant_id, share)
        self._slots.set_limit(tenant_id, terms.concurrent_jobs)

    def waiting_reason(self, job: JobRecord) -> str:
        """Which cap, device, gang, place in the fair order or deadline the job waits for; else what it is
        doing; "" while it is in a base step.
        """
        if not self._background:
            return "the service is starting: jobs go on when its devices are there"
        waits = self._slots.waiting_reason(job.tenant_id, job.job_id)
        if waits is None and self._loop.computes(job.job_id):
            return ""
        return waits or self._loop.waiting_reason(job.job_id) or self._doing(job)

    def _doing(self, job: JobRecord) -> str:
        driver, lease = self._drivers.get(job.job_id), self._book.current(job.job_id)
        if driver is None:
            return "waiting for its data to be read"
        if not driver.leases:
            return driver.phase
        if lease is not None:
            return f"{lease.devices} builds or restores its adapter"
        return ": ".join(filter(None, (driver.phase, self._pool.unable(job.job_id))))

    async def generate(
        self,
        job_id: str | None,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        stop_ids: Sequence[int],
    ) -> tuple[list[int], int]:
        """New tokens and the adapter version that made them (0 for the bare base model)."""
        version, checkpoint = 0, None
        if job_id is not None:
            version, checkpoint = await self._adapter_to_ask(await self._store.job(job_id))
        [tokens] = await self._base.generate(
            job_id,
            [list(prompt_ids)],
            checkpoint=checkpoint,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop_ids=list(stop_ids),
        )
        return tokens, version

    def devices(self) -> list[DeviceStatus]:
        return self._pool.statuses()

    def statistics(self) -> ServiceStatistics:
        return ServiceStatistics(
            uptime_seconds=time.monotonic() - self._started,
            base_busy_seconds=self._loop.busy_seconds,
            base_steps=self._loop.steps_done,
            tokens=self._loop.tokens_done,
        )

    async def _drive(self, record: JobRecord) -> None:
        try:
            driver = await until_available(lambda: self._driver(record))
            self._drivers[record.job_id] = driver  # who asks from here on to stop it asks the driver
            if self._draining:
                driver.ask(Stop.DRAIN, why=AT_COORDINATORS_END)
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
            self._drivers.pop(record.job_id, None)
            self._tasks.pop(record.job_id, None)

    async def _driver(self, record: JobRecord) -> JobDriver:
        spec = _stored_spec(record)
        plan = training_plan(spec, self._description, total_steps=record.total_steps)
        self.set_terms(record.tenant_id, await self._store.terms(record.tenant_id))
        data = await load_job_data(record, spec, self._description, self._storage)
        asked = as_recorded(spec, record.encoding)
        taps, _ = job_taps(asked, self._description, plan.adapter, data.size, self._costs)
        return JobDriver(
            record,
            plan=replace(plan, taps=taps),
            data=data,
            primitives=self._primitives,
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
            driver.ask(stop, why=why)
        else:
            await self._store.transition(job_id, stop.trigger, message=stop.told(why))

    async def _adapter_to_ask(self, record: JobRecord) -> tuple[int, bytes | None]:
        """The version to generate with; a job that holds no lease brings its newest checkpoint."""
        if self._book.current(record.job_id) is not None:
            return record.version, None
        checkpoint = await self._store.latest_checkpoint(record.job_id)
        if checkpoint is None:
            raise Conflict(
                "ADAPTER_NOT_READY",
                "the job has no checkpoint to generate from yet",
                remedy="Wait for its first checkpoint: `cola jobs checkpoints`.",
            )
        return checkpoint.version, await asyncio.to_thread(read_checkpoint, self._storage, checkpoint)

    async def _take_checkpoint(self, lease: Lease, version: int, content: bytes, sha256: str) -> None:
        if not self._checks.arrived(lease, content):
            await self.checkpoints.store(lease, version, content, sha256)

    async def _hear_base_forever(self) -> None:
        after = 0
        while True:
            try:
                after, events = await self._base.next_events(after)
            except Exception as error:
                logger.warning("base model events: %s", error, extra={"event": "base.events_lost"})
                await self._recover_base()
                after = 0
                continue
            for event in events:
                self._hear(event)

    def _hear(self, event: BaseEvent) -> None:
        if isinstance(event, StepApplied):
            self._book.applied(event)
        elif isinstance(event, StepRefused):
            self._book.lose(event.lease, reason=event.reason, message=event.message)
            if not event.lease.further_device_ids:  # of several devices nobody knows which it was
                self.quarantine.strike(event.lease.device_id, event.reason)
        elif isinstance(event, DeviceLinkChanged):
            self._loop.park(event.device_id, parked=event.parked and event.connected)
            if not event.connected:
                self.quarantine.strike(event.device_id, event.fault)
                self._book.lose_link(
                    event.device_id,
                    reason="DEVICE_LINK_LOST",
                    message=f"{event.device_id} left the base model",
                )

    async def _recover_base(self) -> None:
        """The base model actor died: nothing of it is needed, every lease is taken anew once it is back.

        It is back when it describes itself, which starts its gradient server; till then nobody gets a device.
        """
        self._pool.withhold()
        self._book.lose_all(reason="BASE_MODEL_LOST", message="the base model stopped")
        while True:
            await asyncio.sleep(BASE_RETRY_SECONDS)
            try:
                self._description = await self._base.describe()
                break
            except Exception as error:
                logger.warning("base model not back yet: %s", error, extra={"event": "base.waiting"})
        await self._pool.move(self._description.gradient_endpoint)


def _stored_spec(record: JobRecord) -> JobSpec:
    """Raises InvalidInput `STORED_SPEC_INVALID` for what another version accepted and this one does not."""
    try:
        return JobSpec.model_validate_json(record.spec_json)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InvalidInput(
            "STORED_SPEC_INVALID",
            f"another version of the service accepted the job's spec, and this one refuses it: {wrong}",
            where="job",
            remedy="Correct the spec and submit it again; the job's checkpoints are kept.",
        ) from error


def lost_base_reporter(book: LeaseBook) -> Callable[[Exception], None]:
    """For the scheduler loop: a base step that failed for lack of a base model loses every lease."""

    def report(error: Exception) -> None:
        book.lose_all(reason="BASE_MODEL_LOST", message=str(error))

    return report
