"""Walks one job from queued to its end over the adapter primitives; the sentence is `_train`."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from cola_runtime.errors import ColaError, JobFailed, Unavailable
from cola_runtime.jobs.plan import TrainingPlan
from cola_runtime.jobs.records import JobRecord, StepRecord
from cola_runtime.jobs.state import JobState, Trigger
from cola_runtime.jobs.store import JobStore
from cola_runtime.reasons import REASONS
from cola_runtime.rows import Row
from cola_runtime.scheduler.connected_device import UNABLE_REASONS
from cola_runtime.scheduler.deadlines import Pace, seconds_until
from cola_runtime.scheduler.evaluation import Evaluations
from cola_runtime.scheduler.job_data import JobData
from cola_runtime.scheduler.leases import LeaseLost
from cola_runtime.scheduler.loss_watch import FATAL, Diverged, LossWatch
from cola_runtime.scheduler.patience import is_outage, until_available
from cola_runtime.scheduler.phases import JobPhase
from cola_runtime.scheduler.primitives import AdapterPrimitives, LeasedAdapter, StepOutcome, TakenStep
from cola_runtime.scheduler.slots import JobSlots
from cola_runtime.scheduler.stops import Stop, Stopped, StopRequest
from cola_runtime.trace.spans import SpanRecorder
from cola_runtime.types import Lease

logger = logging.getLogger(__name__)

MAX_LOSSES_WITHOUT_PROGRESS = 8  # leases lost in a row at one version before the job is failed
RETRY_PAUSE_SECONDS = 0.1
ENTERING, LEASING = "concurrent jobs", "a device"  # what a job waits for first, as spans' names
INTERNAL_MESSAGE = "the service failed; its log has the cause. Submit the job again."


class _Moved(Exception):
    """The adapter is in a checkpoint, for another device or replica to go on from."""


@dataclass(slots=True)
class _Progress:
    version: int = -1
    losses: int = 0


class JobDriver:
    """One job's coroutine. `phase` says in words what it is waiting for."""

    def __init__(
        self,
        record: JobRecord,
        *,
        plan: TrainingPlan,
        data: JobData,
        primitives: AdapterPrimitives,
        store: JobStore,
        slots: JobSlots,
        spans: SpanRecorder,
    ) -> None:
        self._job_id, self._tenant_id = record.job_id, record.tenant_id
        self._version = min(record.version, record.total_steps - 1)  # when it was taken up
        self._slots = slots
        self._plan, self._data = plan, data
        self._primitives, self._store = primitives, store
        self._evaluations = Evaluations(
            data, total_steps=plan.schedule.total_steps, primitives=primitives, store=store
        )
        self._pace: Pace | None = None
        if record.deadline_at is not None:
            deadline = asyncio.get_running_loop().time() + seconds_until(record.deadline_at)
            self._pace = Pace(deadline=deadline, steps=plan.schedule.total_steps)
        self._watch = LossWatch(record.job_id, plan.watchdog, store)
        self.stop = StopRequest()
        self._waiting = "waiting for a device"
        if plan.shards > 1:
            self._waiting = f"waiting for {plan.shards} devices at once, one for each shard"
        self._phase = JobPhase(record.job_id, spans, text=self._waiting)

    @property
    def phase(self) -> str:
        """What the job does or waits for."""
        if self.stop.asked is None:
            return self._phase.text
        return f"{self._phase.text}; it is {self.stop.asked.value} at the next step boundary"

    @property
    def leases(self) -> bool:
        """It waits for a device, or for one to build or restore its adapter."""
        return self._phase.name in ("", ENTERING, LEASING)

    async def run(self) -> None:
        """Drive the job to a terminal state or to paused. Never raises but on cancellation of the task."""
        try:
            await self._run_in_slot()
            await self._succeed()
        except Stopped as stopped:
            await self._end_by(stopped.stop)
        except Diverged as diverged:
            await self._give_up(diverged)
        except ColaError as error:
            await self._fail(error.reason, str(error))
        except Exception:
            logger.exception(
                "job driver broke", extra={"event": "job.internal_error", "job_id": self._job_id}
            )
            await self._fail("INTERNAL", INTERNAL_MESSAGE)
        finally:
            self._phase.end()

    async def _run_in_slot(self) -> None:
        """As soon as the tenant's cap on concurrent jobs allows it."""
        self._phase.enter(ENTERING, self._waiting)
        due = None
        if self._pace is not None:
            of_a_step = self._primitives.base_seconds(self._data.microbatches(self._version))
            due = self._pace.due(self._version, base_seconds=of_a_step)
        entering = self._slots.enter(self._tenant_id, self._job_id, priority=self._plan.priority, due=due)
        await self.stop.unless_asked(entering)
        try:
            await self._run_leases()
        finally:
            self._slots.leave(self._tenant_id, self._job_id)

    async def _run_leases(self) -> None:
        """Lease, train, and lease again from the last checkpoint whenever the lease is lost."""
        progress = _Progress()
        record = await until_available(lambda: self._store.job(self._job_id))
        if record.state is not JobState.RUNNING:
            await self._move(Trigger.START, message="started")
        while True:
            self.stop.check()
            try:
                await self._run_lease()
                return
            except _Moved as moved:
                await self._note_move(str(moved))
            except (LeaseLost, Unavailable) as lost:
                await self._note_loss(lost, progress)

    async def _run_lease(self) -> None:
        self._phase.enter(LEASING, self._waiting)
        record = await self._store.job(self._job_id)
        adapter = await self.stop.unless_asked(self._primitives.open(record, self._plan))
        try:
            await self._train(adapter)
        finally:
            await self._primitives.close(adapter)

    async def _train(self, adapter: LeasedAdapter) -> None:
        await self._evaluations.resume(adapter.lease.job_id)
        await self._evaluate(adapter)
        ahead: TakenStep | None = None
        while not self._finished(adapter):
            if ahead is None:
                await self._stop_at_boundary(adapter)
                await self._move_at_boundary(adapter)
            ahead = await self._one_step(adapter, ahead)
            await self._evaluate(adapter)
        self._phase.enter("last checkpoint", "waiting for the last checkpoint")
        if adapter.version == self._plan.schedule.total_steps:
            await self._primitives.wait_checkpoint(adapter)  # the device makes one of the last step unasked
        else:
            await self._primitives.checkpoint(adapter)
        self._phase.enter("spot checks", "waiting until its last steps are checked")
        await self._primitives.settle(adapter)

    def _finished(self, adapter: LeasedAdapter) -> bool:
        last = adapter.version == self._plan.schedule.total_steps
        return last or self._evaluations.early_stop is not None

    async def _one_step(self, adapter: LeasedAdapter, taken: TakenStep | None) -> TakenStep | None:
        """Apply the next step, taken already or now; returns the one behind it, if that may run ahead."""
        version, began = adapter.version, asyncio.get_running_loop().time()
        microbatches = self._data.microbatches(version)
        if self._pace is not None:
            base_seconds = self._primitives.base_seconds(microbatches)
            adapter.due = self._pace.due(version, base_seconds=base_seconds)
        named = f"step {version + 1}"
        if taken is None:
            self._phase.enter("base steps", f"{named} is being computed by the base model")
            taken = await self._primitives.take(adapter, microbatches, version=version)
        ahead = self._start_ahead(adapter, version)
        self._phase.enter("its device", f"{named} is with {_named(adapter.lease)}")
        try:
            outcome = await self._primitives.apply(adapter, taken)
            self._phase.enter("recording", f"{named} is being recorded")
            rows = [row for microbatch in microbatches for row in microbatch]
            step = _step_record(adapter, rows, outcome)
            self._watch.check(step.step, step.loss)
            await until_available(lambda: self._store.record_step(step))
            self._primitives.recorded(adapter)
            await self._watch.check_recorded(step.step)
            if self._pace is not None:
                self._pace.step_took(asyncio.get_running_loop().time() - began)
            return None if ahead is None else await ahead
        finally:
            if ahead is not None:
                ahead.cancel()
                await asyncio.gather(ahead, return_exceptions=True)

    def _start_ahead(self, adapter: LeasedAdapter, version: int) -> asyncio.Task[TakenStep] | None:
        """Compute the step behind `version + 1` at `version`, while the device makes that.

        Not behind a checkpoint or an evaluation: what follows them depends on nothing else, so that a job
        which is taken up again there goes the same way. Not towards a stop.
        """
        following = version + 1
        waits = (
            following == self._plan.schedule.total_steps
            or following % self._plan.checkpoint_every == 0
            or self._evaluations.due(following)
            or self.stop.asked is not None
            or bool(self._primitives.move_asked(adapter))
        )
        if waits or not self._plan.max_staleness:
            return None
        rows = self._data.microbatches(following)
        return asyncio.create_task(self._primitives.take(adapter, rows, version=version, staleness=1))

    async def _evaluate(self, adapter: LeasedAdapter) -> None:
        if self._evaluations.due(adapter.version):
            self._phase.enter("evaluation", "evaluating")
            await self._evaluations.run(adapter)

    async def _succeed(self) -> None:
        stop = self._evaluations.early_stop
        if stop is None or stop.step == self._plan.schedule.total_steps:
            await self._move(Trigger.COMPLETE, message="all steps applied")
        else:
            await until_available(lambda: self._store.stop_early(self._job_id, stop.message, data=stop.data))

    async def _stop_at_boundary(self, adapter: LeasedAdapter) -> None:
        leaving = self._primitives.draining(adapter.lease)
        if (self.stop.asked is not None or leaving) and adapter.version > 0:
            self._phase.enter("checkpoint", "making a checkpoint before it stops or moves")
            await self._primitives.checkpoint(adapter)
        self.stop.check()
        if leaving:
            raise LeaseLost(adapter.lease, "DEVICE_DRAINING", f"{_named(adapter.lease)} is leaving")

    async def _move_at_boundary(self, adapter: LeasedAdapter) -> None:
        if self._primitives.move_asked(adapter) and adapter.version > 0:
            self._phase.enter("checkpoint", "making a checkpoint before it moves")
            await self._primitives.checkpoint(adapter)
        why = self._primitives.move_asked(adapter)
        if why:
            raise _Moved(why)

    async def _note_move(self, why: str) -> None:
        await until_available(lambda: self._store.add_event(self._job_id, "lease.moved", why))

    async def _note_loss(self, lost: LeaseLost | Unavailable, progress: _Progress) -> None:
        self._phase.enter("a new lease", f"its lease was lost and is taken anew: {lost.message}")
        record = await until_available(lambda: self._store.job(self._job_id))
        await until_available(
            lambda: self._store.add_event(
                self._job_id,
                "lease.lost",
                f"{lost.reason}: {lost.message}; the job goes on from its last checkpoint",
                level="warning",
                data={"reason": lost.reason, "version": record.version},
            )
        )
        if lost.reason in UNABLE_REASONS:
            return  # each device says so once: the job goes to another one, or waits for one
        if isinstance(lost, Unavailable) and is_outage(lost):
            await asyncio.sleep(RETRY_PAUSE_SECONDS)
            return
        progress.losses = progress.losses + 1 if record.version == progress.version else 1
        progress.version = record.version
        if lost.reason in FATAL:
            raise Diverged(lost.reason, lost.message)
        if progress.losses >= MAX_LOSSES_WITHOUT_PROGRESS:
            raise JobFailed(
                lost.reason,
                f"{progress.losses} leases were lost at version {record.version}; the last: {lost.message}",
                remedy="The last checkpoint is kept. Check `cola doctor`, then submit again.",
            )
        await asyncio.sleep(RETRY_PAUSE_SECONDS * progress.losses)

    async def _end_by(self, stop: Stop) -> None:
        record = await until_available(lambda: self._store.job(self._job_id))
        if stop is not Stop.DRAIN or record.state is JobState.RUNNING:  # else it waits in the queue already
            await self._move(stop.trigger, message=stop.told(self.stop.why))

    async def _give_up(self, diverged: Diverged) -> None:
        """Fail or pause, as the job asks; its last checkpoint is kept."""
        error = JobFailed(diverged.reason, diverged.message, remedy=REASONS[diverged.reason].remedy)
        data = {"reason": diverged.reason}
        await until_available(
            lambda: self._store.add_event(
                self._job_id, "watchdog.acted", diverged.message, level="warning", data=data
            )
        )
        if self._plan.watchdog.action == "pause":
            await self._move(Trigger.PAUSE, message=f"paused by its watchdog: {error}")
        else:
            await self._fail(error.reason, str(error))

    async def _fail(self, reason: str, message: str) -> None:
        await self._move(Trigger.FAIL, message=message, failure_reason=reason, failure_message=message)

    async def _move(self, trigger: Trigger, **told: str) -> None:
        await until_available(lambda: self._store.transition(self._job_id, trigger, **told))


def _named(lease: Lease) -> str:
    return f"device {lease.devices}" if len(lease.device_ids) == 1 else f"devices {lease.devices}"


def _step_record(adapter: LeasedAdapter, rows: list[Row], outcome: StepOutcome) -> StepRecord:
    return StepRecord(
        job_id=adapter.lease.job_id,
        epoch=adapter.lease.epoch,
        step=outcome.applied.version,
        loss=outcome.loss.mean,
        learning_rate=outcome.applied.learning_rate,
        gradient_norm=outcome.applied.gradient_norm,
        tokens=sum(row.length for row in rows),
        label_tokens=sum(row.label_tokens for row in rows),
        device_id=adapter.lease.devices,
        bytes_up=outcome.applied.bytes_up,
        bytes_down=outcome.applied.bytes_down,
        base_seconds=outcome.loss.base_seconds,
        device_seconds=outcome.applied.device_seconds,
        chain=" ".join(outcome.applied.links),
    )
