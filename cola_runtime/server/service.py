"""The use cases of the service, free of any wire: whichever door calls, the same checks and limits apply.

Every method takes the authenticated tenant first and finds jobs among that tenant's only, so another tenant's
object is simply not there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cola_runtime.data.report import DatasetReport
from cola_runtime.errors import Conflict, Unavailable
from cola_runtime.gradients.planner import Costs
from cola_runtime.jobs.database import OUTAGES
from cola_runtime.jobs.recall import Recall
from cola_runtime.jobs.records import (
    CheckpointRecord,
    EvaluationRecord,
    EventRecord,
    JobRecord,
    StepRecord,
    Tenant,
    TenantTerms,
    Usage,
)
from cola_runtime.jobs.state import JobState
from cola_runtime.jobs.store import JobStore
from cola_runtime.jobs.watch import JobWatch
from cola_runtime.scheduler.device_pool import DeviceStatus
from cola_runtime.scheduler.runner import JobRunner, ServiceStatistics
from cola_runtime.server.admission import Admission, Submission
from cola_runtime.server.base_models import BaseModels
from cola_runtime.server.estimates import JobEstimate, Situation, estimate_job
from cola_runtime.server.exports import adapter_files, no_best, pick_checkpoint
from cola_runtime.server.job_creation import JobCreation
from cola_runtime.server.limits import Limits
from cola_runtime.server.prompts import Completion, Prompts
from cola_runtime.storage.objects import ObjectStorage
from cola_runtime.trace.report import EXPORT
from cola_runtime.types import BaseModelDescription

BEST: Literal["best"] = "best"
OUTAGE_PAUSE_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """What a tenant may know of the service."""

    tenant: Tenant
    base_models: tuple[BaseModelDescription, ...]
    devices: tuple[DeviceStatus, ...]
    statistics: ServiceStatistics
    degraded: str  # why answers may be stale and writes are refused; empty: all is well


class FineTuningService:
    """Submit, watch, steer and use jobs."""

    def __init__(
        self,
        *,
        store: JobStore,
        storage: ObjectStorage,
        runner: JobRunner,
        base_models: Mapping[str, BaseModelDescription],
        limits: Limits | None = None,
        costs: Mapping[str, Costs] | None = None,
    ) -> None:
        self.store = store
        self.recall = Recall(store)
        self.limits = limits or Limits()
        self._storage = storage
        self._runner = runner
        self._creation = JobCreation(store=store, storage=storage, runner=runner, limits=self.limits)
        self._base_models = BaseModels(base_models, costs or {})
        self._admission = Admission(self._base_models)
        self._prompts = Prompts(self._base_models, self.limits)

    async def check_dataset(self, tenant: Tenant, submission: Submission) -> DatasetReport:
        """The checks of `submit`; nothing is created."""
        return (await self._admission.check(submission)).report

    async def estimate(self, tenant: Tenant, submission: Submission) -> JobEstimate:
        """What the job would take, after the checks of `submit`; nothing is created."""
        checked = await self._admission.check(submission)
        await self._creation.check_quota(tenant.tenant_id, "", steps=checked.report.steps)
        devices, name = self._runner.devices(), checked.spec.base_model
        situation = Situation(
            costs=self._base_models.costs(name),
            terms=await self.store.accounts.terms(tenant.tenant_id),
            loads=await self.store.accounts.loads(name),
            tenant_id=tenant.tenant_id,
            seconds_per_token=self._runner.seconds_per_token(name),
            replicas=sum(each.base_model == name for each in self._runner.statistics().replicas),
            device_id=devices[0].device_id if devices else "device-0",
        )
        base = self._base_models.find(name)
        return await asyncio.to_thread(estimate_job, checked, base, situation)

    async def submit(self, tenant: Tenant, submission: Submission) -> JobRecord:
        """A queued job, already handed to the runner. Whatever is wrong, nothing was created."""
        checked = await self._admission.check(submission)
        return await self._creation.create(tenant, submission, checked)

    def terms_changed(self, tenant_id: str, terms: TenantTerms) -> None:
        """An operator has set them; the scheduler goes by them from now on."""
        self._runner.set_terms(tenant_id, terms)

    async def job(self, tenant: Tenant, ref: str) -> JobRecord:
        """Stale while the job store cannot be read; so are `jobs`."""
        return await self.recall.find_job(tenant.tenant_id, ref)

    async def jobs(self, tenant: Tenant, *, limit: int = 0, after: str = "") -> list[JobRecord]:
        """Newest first, behind the job `after`."""
        return await self.recall.jobs(tenant.tenant_id, limit=self._page(limit), after=after or None)

    def waiting_reason(self, job: JobRecord) -> str:
        """Why the job is not in a base step now; empty if it is, or has ended."""
        if job.stale:
            return f"not known now; shown is what was last known ({self.recall.degraded})"
        if job.ended:
            return ""
        if job.state is JobState.PAUSED:
            return "paused; it goes on when it is resumed"
        return self._runner.waiting_reason(job)

    def replica(self, job: JobRecord) -> str:
        """Which replica of its base model computes the job's rows; "" if none does now."""
        return self._runner.replica(job)

    async def cancel(self, tenant: Tenant, ref: str) -> JobRecord:
        """An ended job stays as it is."""
        job = await self._recorded(tenant, ref)
        await self._runner.cancel(job.job_id)
        return await self.store.job(job.job_id)

    async def pause(self, tenant: Tenant, ref: str) -> JobRecord:
        job = await self._recorded(tenant, ref)
        if job.ended:
            raise Conflict("JOB_ENDED", f"the job is {job.state}; only an active job can be paused")
        await self._runner.pause(job.job_id)
        return await self.store.job(job.job_id)

    async def resume(self, tenant: Tenant, ref: str) -> JobRecord:
        job = await self._recorded(tenant, ref)
        await self._runner.resume(job.job_id)
        return await self.store.job(job.job_id)

    async def event_pages(
        self, tenant: Tenant, ref: str, *, after: int, follow: bool
    ) -> AsyncIterator[list[EventRecord]]:
        """The job's events behind `after`, each once and in order; with `follow`, until it has ended.

        An empty page comes every `key_check_seconds` of silence, and while the job store cannot be read.
        """
        job = await self.job(tenant, ref)
        watch = self.store.watch(job.job_id, after=after, page=self.limits.page)
        while (page := await self._next_events(watch, follow=follow)) is not None:
            yield page

    async def _next_events(self, watch: JobWatch, *, follow: bool) -> list[EventRecord] | None:
        """Empty after a silence, also of the job store; None at the end."""
        try:
            news = await watch.news(timeout_seconds=self.limits.key_check_seconds if follow else 0.0)
        except Unavailable as error:
            if not follow or error.reason not in OUTAGES:
                raise
            await asyncio.sleep(OUTAGE_PAUSE_SECONDS)
            return []
        at_end = not news.events and (news.ended or not follow)
        return None if at_end else news.events

    async def steps(self, tenant: Tenant, ref: str, *, after: int = 0, limit: int = 0) -> list[StepRecord]:
        job = await self._recorded(tenant, ref)
        return await self.store.steps(job.job_id, after=after, limit=self._page(limit))

    async def evaluations(
        self, tenant: Tenant, ref: str, *, after: int = -1, limit: int = 0
    ) -> tuple[list[EvaluationRecord], int | None]:
        """Evaluations of steps above `after`, in order; and the step of the best one so far."""
        job = await self._recorded(tenant, ref)
        found = await self.store.evaluations(job.job_id, after=after, limit=self._page(limit))
        return found, await self._best_step(job)

    async def checkpoints(self, tenant: Tenant, ref: str) -> tuple[list[CheckpointRecord], int | None]:
        """Checkpoints by version; and the best evaluation's step."""
        job = await self._recorded(tenant, ref)
        return await self.store.checkpoints.of(job.job_id), await self._best_step(job)

    async def pin(self, tenant: Tenant, ref: str, *, version: int | None) -> CheckpointRecord:
        """Keep a checkpoint (None: the newest) for good; a second time changes nothing.

        Raises NotFound `CHECKPOINT_UNKNOWN`, Conflict `ADAPTER_NOT_READY`, QuotaExceeded `QUOTA_PINNED`.
        """
        job = await self._recorded(tenant, ref)
        return await self.store.checkpoints.pin(job.job_id, version)

    async def unpin(self, tenant: Tenant, ref: str, *, version: int) -> CheckpointRecord:
        """It goes when retention says, which may be now. Raises NotFound `CHECKPOINT_UNKNOWN`."""
        job = await self._recorded(tenant, ref)
        unpinned = await self.store.checkpoints.unpin(job.job_id, version)
        await self._runner.retire(job.job_id)
        return unpinned

    async def best_step(self, tenant: Tenant, ref: str) -> int | None:
        """Of the best evaluation so far."""
        return await self._best_step(await self._recorded(tenant, ref))

    async def export(
        self, tenant: Tenant, ref: str, *, version: int | Literal["best"] | None = None
    ) -> dict[str, bytes]:
        """File name -> content of a PEFT folder with the newest checkpoint's adapter, or `version`'s.

        `best` is the best evaluation's version. Raises Conflict `ADAPTER_NOT_READY`, NotFound
        `CHECKPOINT_UNKNOWN` or `BEST_UNKNOWN` for a job without evaluations.
        """
        job = await self._recorded(tenant, ref)
        if version == BEST:
            version = await self._best_step(job)
            if version is None:
                raise no_best(job)
        checkpoint = pick_checkpoint(await self.store.checkpoints.of(job.job_id), job, version)
        begin = time.monotonic()
        files = await asyncio.to_thread(adapter_files, self._storage, checkpoint, job)
        end, version = time.monotonic(), checkpoint.version
        self._runner.spans.add("exports", EXPORT, begin=begin, end=end, job=job.job_id, version=version)
        return files

    async def generate(
        self,
        tenant: Tenant,
        ref: str,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        base_model: str = "",
        max_new_tokens: int = 0,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Completion:
        """Continue a text or answer messages; an empty `ref` asks the bare base model."""
        job = await self._recorded(tenant, ref) if ref else None
        name = job.base_model if job else base_model or self._base_models.default
        encoded = await self._prompts.encode(
            name, prompt, max_new_tokens=max_new_tokens, temperature=temperature
        )
        tokens, version = await self._runner.generation.generate(
            job.job_id if job else None,
            encoded.token_ids,
            base_model=name,
            max_new_tokens=encoded.max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop_ids=encoded.stop_ids,
        )
        return await self._prompts.decode(encoded, tokens, version)

    async def usage(self, tenant: Tenant) -> Usage:
        """What the tenant's jobs have used."""
        return await self.store.accounts.usage(tenant.tenant_id)

    async def usage_of_all(self) -> list[Usage]:
        """Of every tenant. For operators."""
        return await self.store.accounts.usage_of_all()

    async def start_trace(self) -> None:
        """Record what the whole service does. For operators: it shows all tenants' jobs."""
        await self._runner.trace.start()

    async def stop_trace(self) -> bytes:
        """The trace that was recorded, in Chrome's format."""
        return await self._runner.trace.stop()

    def describe(self, tenant: Tenant) -> Overview:
        return Overview(
            tenant=tenant,
            base_models=self._base_models.descriptions,
            devices=tuple(self._runner.devices()),
            statistics=self._runner.statistics(),
            degraded=self.recall.degraded,
        )

    async def _recorded(self, tenant: Tenant, ref: str) -> JobRecord:
        """The job as it stands: whoever acts on it needs no memory of it."""
        return await self.store.find_job(tenant.tenant_id, ref)

    async def _best_step(self, job: JobRecord) -> int | None:
        best = await self.store.best_evaluation(job.job_id)
        return None if best is None else best.step

    def _page(self, limit: int) -> int:
        return min(limit, self.limits.page) if limit > 0 else self.limits.page
