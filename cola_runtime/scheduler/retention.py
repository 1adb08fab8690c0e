"""Lets go of checkpoints that need not be kept, and of objects that nothing names.

A record goes first and its object after it: what a crash leaves in between is an object that nothing names,
and never a record of nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from cola_runtime.config import RetentionSettings
from cola_runtime.jobs.records import CheckpointRecord
from cola_runtime.jobs.retention import superfluous
from cola_runtime.jobs.store import JobStore
from cola_runtime.scheduler.patience import until_available
from cola_runtime.storage.objects import ObjectStorage

logger = logging.getLogger(__name__)

INDEX_SUFFIX = ".json"
OBJECT_SUFFIX = ".safetensors"
_COLLECTED = ("checkpoints/", "datasets/")


def shard_key(index_key: str, number: int) -> str:
    """Where a shard of the checkpoint lies whose index is at `index_key`."""
    return f"{index_key.removesuffix(INDEX_SUFFIX)}-{number}{OBJECT_SUFFIX}"


async def retire(
    job_id: str,
    *,
    store: JobStore,
    storage: ObjectStorage,
    settings: RetentionSettings,
    keep: Collection[int] = (),
) -> None:
    """Delete the job's superfluous checkpoints; pinned ones, the best one and those of `keep` stay."""
    if settings.keep_last is None and settings.max_bytes_per_job is None:
        return
    best = await until_available(lambda: store.best_evaluation(job_id))
    checkpoints = await until_available(lambda: store.checkpoints.of(job_id))
    kept = {*keep, *(each.version for each in checkpoints if each.pinned)}
    kept |= set() if best is None else {best.step}
    gone = superfluous(checkpoints, keep=kept, settings=settings)
    if gone:
        versions = [record.version for record in gone]
        await until_available(lambda: store.checkpoints.retire(job_id, versions))
        for record in gone:
            await asyncio.to_thread(_delete, record, storage)


async def collect_orphans(store: JobStore, storage: ObjectStorage) -> int:
    """Delete the objects that no record names, and return how many. Only while nothing else stores any."""
    named = await store.checkpoints.storage_keys()
    stems = {key.removesuffix(INDEX_SUFFIX) for key in named if key.endswith(INDEX_SUFFIX)}
    orphans = [
        key
        for prefix in _COLLECTED
        for key in await asyncio.to_thread(storage.list, prefix)
        if key not in named and key.rpartition("-")[0] not in stems
    ]
    for key in orphans:
        await asyncio.to_thread(storage.delete, key)
    if orphans:
        logger.warning("%d objects belonged to nothing", len(orphans), extra={"event": "storage.orphans"})
    return len(orphans)


def _delete(record: CheckpointRecord, storage: ObjectStorage) -> None:
    stem, _, suffix = record.storage_key.rpartition(".")
    keys = storage.list(f"{stem}-") if f".{suffix}" == INDEX_SUFFIX else []
    for key in (record.storage_key, *keys):
        storage.delete(key)
