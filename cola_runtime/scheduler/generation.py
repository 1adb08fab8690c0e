"""Asks a replica of a base model to generate, with a job's adapter or without."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from cola_runtime.errors import Conflict
from cola_runtime.jobs.records import JobRecord
from cola_runtime.jobs.store import JobStore
from cola_runtime.scheduler.checkpoints import read_checkpoint
from cola_runtime.scheduler.leases import LeaseBook
from cola_runtime.scheduler.replicas import ReplicaSet
from cola_runtime.storage.objects import ObjectStorage


class Generation:
    """`replicas` by base model."""

    def __init__(
        self, replicas: Mapping[str, ReplicaSet], *, book: LeaseBook, store: JobStore, storage: ObjectStorage
    ) -> None:
        self._replicas = replicas
        self._book, self._store, self._storage = book, store, storage

    async def generate(
        self,
        job_id: str | None,
        prompt_ids: Sequence[int],
        *,
        base_model: str,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        stop_ids: Sequence[int],
    ) -> tuple[list[int], int]:
        """New tokens and the adapter version that made them (0 for the bare base model)."""
        version, checkpoint = 0, None
        if job_id is not None:
            version, checkpoint = await self._adapter_to_ask(await self._store.job(job_id))
        replica = self._replicas[base_model].to_ask(job_id)
        [tokens] = await replica.base.generate(
            job_id,
            [list(prompt_ids)],
            checkpoint=checkpoint,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop_ids=list(stop_ids),
        )
        return tokens, version

    async def _adapter_to_ask(self, record: JobRecord) -> tuple[int, bytes | None]:
        """The version to generate with; a job that holds no lease brings its newest checkpoint."""
        if self._book.current(record.job_id) is not None:
            return record.version, None
        checkpoint = await self._store.checkpoints.latest(record.job_id)
        if checkpoint is None:
            raise Conflict(
                "ADAPTER_NOT_READY",
                "the job has no checkpoint to generate from yet",
                remedy="Wait for its first checkpoint: `cola jobs checkpoints`.",
            )
        return checkpoint.version, await asyncio.to_thread(read_checkpoint, self._storage, checkpoint)
