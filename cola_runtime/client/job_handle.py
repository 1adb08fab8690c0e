"""What can be done with one job, asynchronously."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cola_runtime.client.connection import Connection
from cola_runtime.client.folders import new_folder
from cola_runtime.client.values import (
    Checkpoint,
    Evaluation,
    Event,
    Generation,
    Job,
    Step,
    event_from,
    value_from,
)
from cola_runtime.errors import JobFailed, Unavailable
from cola_runtime.proto import jobs_pb2

EXPORT_TIMEOUT_SECONDS = 900.0
GENERATE_TIMEOUT_SECONDS = 300.0
RECONNECT_FOR_SECONDS = 60.0
RECONNECT_EVERY_SECONDS = 0.5
PAGE = 500

Prompt = str | Sequence[Mapping[str, Any]]
"""A text to continue, or chat messages (`role`, `content`) to answer."""


class AsyncJobHandle:
    """One job. `job` is how it stood when last asked."""

    def __init__(self, connection: Connection, job: Job) -> None:
        self._connection = connection
        self.job = job

    @property
    def job_id(self) -> str:
        return self.job.job_id

    @property
    def name(self) -> str:
        return self.job.name

    async def refresh(self) -> Job:
        """How the job stands now."""
        return await self._act("GetJob")

    async def wait(self, timeout: float | None = None, *, check: bool = True) -> Job:  # noqa: ASYNC109 (public)
        """The job once it has ended.

        Raises JobFailed unless it succeeded (with `check`), TimeoutError after `timeout` seconds.
        """
        async with asyncio.timeout(timeout):
            async for _event in self.events():
                pass
            job = await self.refresh()
        if check and job.state != "succeeded":
            raise _failure(job)
        return job

    async def events(self, *, after: int = 0, follow: bool = True) -> AsyncIterator[Event]:
        """The events behind `after`, each once and in order, until the job ends (`follow`) or up to now.

        A lost connection is taken up again behind the last event seen.
        """
        last, lost_at = after, None
        while True:
            request = jobs_pb2.WatchEventsRequest(job_id=self.job_id, after=last, follow=follow)
            try:
                async for message in self._connection.stream("WatchEvents", request):
                    lost_at = None
                    if message.id > last:
                        last = message.id
                        yield event_from(message)
                return
            except Unavailable:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > RECONNECT_FOR_SECONDS:
                    raise
            await asyncio.sleep(RECONNECT_EVERY_SECONDS)

    async def metrics(self, *, after: int = 0) -> list[Step]:
        """Every applied step above `after`."""
        steps: list[Step] = []
        while True:
            last = steps[-1].step if steps else after
            request = jobs_pb2.ListStepsRequest(job_id=self.job_id, after=last, limit=PAGE)
            page = (await self._connection.call("ListSteps", request)).steps
            steps += [value_from(Step, step) for step in page]
            if len(page) < PAGE:
                return steps

    async def evaluations(self) -> list[Evaluation]:
        """What the held-out rows gave, by step: before the first, every so many, after the last."""
        found: list[Evaluation] = []
        while True:
            after = found[-1].step if found else None
            request = jobs_pb2.ListEvaluationsRequest(job_id=self.job_id, after=after, limit=PAGE)
            page = (await self._connection.call("ListEvaluations", request)).evaluations
            found += [value_from(Evaluation, evaluation) for evaluation in page]
            if len(page) < PAGE:
                return found

    async def cancel(self) -> Job:
        """End the job; its checkpoints stay. An ended job stays as it is."""
        return await self._act("CancelJob")

    async def pause(self) -> Job:
        """Stop after the current step, to be resumed."""
        return await self._act("PauseJob")

    async def resume(self) -> Job:
        return await self._act("ResumeJob")

    async def checkpoints(self) -> list[Checkpoint]:
        """Oldest first."""
        answer = await self._connection.call("ListCheckpoints", jobs_pb2.JobRef(job_id=self.job_id))
        return [value_from(Checkpoint, checkpoint) for checkpoint in answer.checkpoints]

    async def pin(self, version: int | None = None) -> Checkpoint:
        """Keep the newest checkpoint, or `version`'s, for good, whatever the service's retention says."""
        request = jobs_pb2.PinCheckpointRequest(job_id=self.job_id, version=version)
        return value_from(Checkpoint, await self._connection.call("PinCheckpoint", request))

    async def unpin(self, version: int) -> Checkpoint:
        """Let a checkpoint go as the service's retention says."""
        request = jobs_pb2.UnpinCheckpointRequest(job_id=self.job_id, version=version)
        return value_from(Checkpoint, await self._connection.call("UnpinCheckpoint", request))

    async def download_adapter(
        self, path: str | Path, *, version: int | Literal["best"] | None = None, overwrite: bool = False
    ) -> Path:
        """Write the newest checkpoint, or `version`'s, as a folder: complete or not at all.

        `best` is the version with the best evaluation. A PEFT folder of LoRA and linearized LoRA, a cola
        folder of other kinds (docs/adapter_kinds.md).
        """
        which = {"best": True} if version == "best" else {"version": version}
        request = jobs_pb2.ExportAdapterRequest(job_id=self.job_id, **which)
        with new_folder(Path(path), overwrite=overwrite) as folder:
            async for chunk in self._connection.stream(
                "ExportAdapter", request, timeout_seconds=EXPORT_TIMEOUT_SECONDS
            ):
                await asyncio.to_thread(folder.append, chunk.file_name, chunk.content)
        return Path(path)

    async def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Generation:
        """Continue a text, or answer chat messages, with this job's adapter as it is now."""
        request = generate_request(prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        request.job_id = self.job_id
        answer = await self._connection.call("Generate", request, timeout_seconds=GENERATE_TIMEOUT_SECONDS)
        return value_from(Generation, answer)

    async def _act(self, rpc: str) -> Job:
        self.job = value_from(Job, await self._connection.call(rpc, jobs_pb2.JobRef(job_id=self.job_id)))
        return self.job


def generate_request(
    prompt: Prompt, *, max_new_tokens: int, temperature: float, seed: int
) -> jobs_pb2.GenerateRequest:
    return jobs_pb2.GenerateRequest(
        prompt=prompt if isinstance(prompt, str) else "",
        messages_json="" if isinstance(prompt, str) else json.dumps(list(prompt)),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )


def _failure(job: Job) -> JobFailed:
    return JobFailed(
        job.failure_reason or f"JOB_{job.state.upper()}",
        f"job {job.name} ({job.job_id}) {job.state} after {job.version} of {job.total_steps} steps"
        + (f": {job.failure_message}" if job.failure_message else ""),
        remedy=f"`cola jobs logs {job.job_id}` shows its history.",
    )
