"""Makes a job of a checked submission, within what its tenant may have; or nothing at all."""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from dataclasses import replace

from cola_runtime.errors import QuotaExceeded
from cola_runtime.jobs.records import JobRecord, NewJob, Tenant
from cola_runtime.jobs.store import JobStore
from cola_runtime.scheduler.runner import JobRunner
from cola_runtime.server.admission import CheckedJob, Submission
from cola_runtime.server.limits import Limits
from cola_runtime.storage.objects import ObjectStorage


class JobCreation:
    """Objects first, record after; then the runner starts the job."""

    def __init__(self, *, store: JobStore, storage: ObjectStorage, runner: JobRunner, limits: Limits) -> None:
        self._store, self._storage = store, storage
        self._runner, self._limits = runner, limits
        self._creations: set[asyncio.Task[JobRecord]] = set()
        self._admitting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by tenant

    async def create(self, tenant: Tenant, submission: Submission, checked: CheckedJob) -> JobRecord:
        """A queued job, already handed to the runner.

        Raises as `check_quota`, Conflict `IDEMPOTENCY_CONFLICT`.
        """
        new = _new_job(tenant, submission, checked)
        creation = asyncio.create_task(self._create_and_start(new, submission, checked))
        self._creations.add(creation)
        creation.add_done_callback(self._creations.discard)
        return await asyncio.shield(creation)  # a caller who leaves now leaves a whole job, not half of one

    async def check_quota(self, tenant_id: str, idempotency_key: str, *, steps: int) -> None:
        """Raises QuotaExceeded `QUOTA_JOBS`, `QUOTA_STEPS`; a repeated request is no new job."""
        most = self._limits.active_jobs
        active = await self._store.active_jobs(tenant_id, but_key=idempotency_key)
        if active is None:
            return
        if active >= most:
            raise QuotaExceeded(
                "QUOTA_JOBS",
                "the tenant has as many active jobs as it may have",
                limit=most,
                actual=active + 1,
                remedy="Wait for one to end, or cancel one: `cola jobs cancel`.",
            )
        cap = (await self._store.accounts.terms(tenant_id)).total_steps
        if cap is not None:
            taken = await self._store.accounts.steps(tenant_id)
            if taken + steps > cap:
                raise QuotaExceeded(
                    "QUOTA_STEPS",
                    f"the tenant's jobs have {taken} steps and this one would add {steps}",
                    limit=cap,
                    actual=taken + steps,
                    remedy="Ask for fewer steps, cancel a job, or ask the operator for more.",
                )

    async def _create_and_start(self, new: NewJob, submission: Submission, checked: CheckedJob) -> JobRecord:
        async with self._admitting[new.tenant_id]:  # two at once would both be the last that is allowed
            await self.check_quota(new.tenant_id, submission.idempotency_key, steps=new.total_steps)
            job = await self._create(new, submission)
        if job.job_id == new.job_id:
            await self._store.add_event(
                job.job_id, "encoding.chosen", checked.taps_reason, data={"encoding": str(checked.taps)}
            )
        await self._runner.start(job.job_id)
        return job

    async def _create(self, new: NewJob, submission: Submission) -> JobRecord:
        """Objects first, record after. Unless the record is ours, the objects go again."""
        contents = {new.training_key: submission.training}
        if new.evaluation_key is not None and submission.evaluation is not None:
            contents[new.evaluation_key] = submission.evaluation
        created: JobRecord | None = None
        try:
            for key, content in contents.items():
                await asyncio.to_thread(self._storage.put, key, content)
            created = await self._store.create_job(new)
            return created
        finally:
            if created is None or created.job_id != new.job_id:
                for key in contents:
                    await asyncio.to_thread(self._storage.delete, key)


def _new_job(tenant: Tenant, submission: Submission, checked: CheckedJob) -> NewJob:
    spec_json = checked.spec.model_dump_json()
    job = NewJob(
        tenant_id=tenant.tenant_id,
        name=checked.spec.name,
        base_model=checked.spec.base_model,
        spec_json=spec_json,
        total_steps=checked.report.steps,
        encoding=str(checked.taps),
        training_key="",
        request_digest=_digest(spec_json.encode(), submission.training, submission.evaluation),
        training_name=submission.training_name,
        evaluation_name=submission.evaluation_name,
        idempotency_key=submission.idempotency_key or None,
        deadline_seconds=None if checked.spec.deadline is None else checked.spec.deadline.seconds,
    )
    return replace(
        job,
        training_key=f"datasets/{job.job_id}/training.jsonl",
        evaluation_key=None if submission.evaluation is None else f"datasets/{job.job_id}/evaluation.jsonl",
    )


def _digest(*parts: bytes | None) -> str:
    """One digest over parts whose borders cannot be moved."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"-" if part is None else hashlib.sha256(part).digest())
    return digest.hexdigest()
