"""Checkpoints in object storage: object first, record after.

Of a sharded adapter there is an object per shard and, once all of them are stored, an index; the index is
what the record names, so that half a checkpoint is none.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cola_runtime.adapter_spec import AdapterSpec, Frozen
from cola_runtime.adapters.checkpoint_format import Encoded, decode_checkpoint
from cola_runtime.adapters.joined_checkpoint import join_checkpoints
from cola_runtime.config import RetentionSettings
from cola_runtime.errors import ColaError, Conflict, Unavailable
from cola_runtime.jobs.plan import TrainingPlan
from cola_runtime.jobs.records import CheckpointRecord, JobRecord
from cola_runtime.jobs.spot_check_rows import PendingCheck
from cola_runtime.jobs.store import JobStore
from cola_runtime.scheduler.leases import LeaseBook, LeaseLost
from cola_runtime.scheduler.patience import until_available
from cola_runtime.scheduler.retention import INDEX_SUFFIX, OBJECT_SUFFIX, retire, shard_key
from cola_runtime.storage.objects import ObjectStorage
from cola_runtime.trace.spans import SpanRecorder
from cola_runtime.types import Lease
from cola_runtime.update_chain import RecordedLink

RECORD_TIMEOUT_SECONDS = 900.0  # its step may wait for a job store that is away; a lost lease ends it at once
_UNUSABLE = ("CHECKPOINT_DAMAGED", "CHECKPOINT_INVALID", "CHECKPOINT_UNCHAINED", "OBJECT_UNKNOWN")
KEEP_ALL = RetentionSettings()


class StoredShard(Frozen):
    """One shard's object."""

    bytes: int
    sha256: str


class ShardIndex(Frozen):
    """A sharded adapter's checkpoint: of what, and its objects by shard. Equal ones have equal bytes."""

    format: Literal[1] = 1
    version: int
    adapter: AdapterSpec
    shards: tuple[StoredShard, ...]


@dataclass(slots=True)
class _Gathering:
    """A sharded adapter's lease, and what is stored of checkpoints that are not whole yet, by version."""

    lease: Lease
    adapter: AdapterSpec
    stored: dict[int, dict[int, StoredShard]] = field(default_factory=dict)


def _ignore(_record: CheckpointRecord) -> None:
    """Who hears of checkpoints where nobody does."""


def _unchecked(_record: CheckpointRecord) -> PendingCheck | None:
    """What of a checkpoint is to be checked where nobody checks."""
    return None


def _nothing(_job_id: str) -> Collection[int]:
    """What must stay where nobody needs any."""
    return ()


class CheckpointShelf:
    """Takes what the devices hand on, under current leases. Belongs to the coordinator's event loop."""

    def __init__(
        self,
        *,
        book: LeaseBook,
        store: JobStore,
        storage: ObjectStorage,
        spans: SpanRecorder | None = None,
        retention: RetentionSettings = KEEP_ALL,
    ) -> None:
        self._spans = spans or SpanRecorder()
        self._retention = retention
        self._book, self._store, self._storage = book, store, storage
        self._gatherings: dict[str, _Gathering] = {}
        self.to_check: Callable[[CheckpointRecord], PendingCheck | None] = _unchecked
        self.on_recorded: Callable[[CheckpointRecord], None] = _ignore
        self.needed: Callable[[str], Collection[int]] = _nothing  # versions of a job that must stay for now

    def expect(self, lease: Lease, adapter: AdapterSpec) -> None:
        """Checkpoints of `adapter` will come, a part from each of the lease's devices."""
        self._gatherings[lease.job_id] = _Gathering(lease, adapter)

    def forget(self, lease: Lease) -> None:
        gathering = self._gatherings.get(lease.job_id)
        if gathering is not None and gathering.lease == lease:
            del self._gatherings[lease.job_id]

    async def store(self, part: Lease, version: int, content: Encoded, sha256: str) -> None:
        """What the device pool calls when a checkpoint arrived whole.

        It may arrive before the step that it holds is recorded, since that goes by way of the base model.
        """
        await self._book.wait_recorded(part, version, timeout_seconds=RECORD_TIMEOUT_SECONDS)
        gathering = self._gatherings.get(part.job_id)
        if gathering is None or not gathering.lease.covers(part):
            raise LeaseLost(part, "LEASE_ENDED", "the lease is no longer open")
        await self._check_arrived(gathering, part, version, content)
        begin = time.monotonic()
        await self._store_part(gathering, part, version, content, sha256)
        self._spans.add(
            "checkpoints",
            "checkpoint",
            begin=begin,
            end=time.monotonic(),
            job=part.job_id,
            version=version,
            bytes=len(content),
        )

    async def newest_good(
        self, record: JobRecord, plan: TrainingPlan
    ) -> tuple[CheckpointRecord, tuple[RecordedLink, ...]] | None:
        """The newest checkpoint to go on from, and its links; None: from the seed.

        One above the recorded version is left out, since its last steps never became part of the record. One
        that is damaged, or not of the job's update chain, leaves the record: event `checkpoint.refused`.
        """
        found = await self._store.checkpoints.of(record.job_id)
        for checkpoint in reversed([each for each in found if each.version <= record.version]):
            links = await self._store.links(record.job_id, checkpoint.version)
            try:
                await asyncio.to_thread(self._check_stored, checkpoint, plan, links)
            except ColaError as error:
                if error.reason not in _UNUSABLE:
                    raise
                await self._refuse(checkpoint, error)
            else:
                return checkpoint, links
        return None

    async def _refuse(self, checkpoint: CheckpointRecord, error: ColaError) -> None:
        message = f"the checkpoint of version {checkpoint.version} is not used: {error}"
        data = {"version": checkpoint.version, "reason": error.reason}
        await self._store.add_event(
            checkpoint.job_id, "checkpoint.refused", message, data=data, level="warning"
        )
        await self._store.checkpoints.retire(checkpoint.job_id, [checkpoint.version])

    def _check_stored(
        self, record: CheckpointRecord, plan: TrainingPlan, links: Sequence[RecordedLink]
    ) -> None:
        for number in range(plan.shards):
            content = self.read_shard(record, plan, number)
            if links:
                check_chained(content, links[number])

    async def _check_arrived(
        self, gathering: _Gathering, part: Lease, version: int, content: Encoded
    ) -> None:
        """Raises Conflict `CHECKPOINT_UNCHAINED`; the lease is lost: the job goes on from the last one."""
        links = await until_available(lambda: self._store.links(part.job_id, version))
        if not links:
            return
        number = gathering.lease.device_ids.index(part.device_id)
        try:
            await asyncio.to_thread(check_chained, content, links[number])
        except ColaError as error:
            self._book.lose(part, reason=error.reason, message=error.message)
            raise

    async def _store_part(
        self, gathering: _Gathering, part: Lease, version: int, content: Encoded, sha256: str
    ) -> None:
        stem = f"checkpoints/{part.job_id}/{version:08d}-{part.epoch:06d}"
        shard = StoredShard(bytes=len(content), sha256=sha256)
        if len(gathering.lease.device_ids) == 1:
            await self._put(stem + OBJECT_SUFFIX, content)
            await self._record(part, version, stem + OBJECT_SUFFIX, shard)
            return
        number = gathering.lease.device_ids.index(part.device_id)
        await self._put(shard_key(stem + INDEX_SUFFIX, number), content)
        stored = gathering.stored.setdefault(version, {})
        stored[number] = shard
        if len(stored) == len(gathering.lease.device_ids):
            await self._store_index(gathering, version, stem + INDEX_SUFFIX)

    def read_shard(self, record: CheckpointRecord, plan: TrainingPlan, number: int) -> bytes:
        """The checkpoint that the device of this shard goes on from; without shards, the whole one.

        Raises Conflict `CHECKPOINT_MISMATCH` when it is not of the plan's adapter in as many shards,
        Unavailable `CHECKPOINT_DAMAGED`.
        """
        content = _read(self._storage, record, record.storage_key, record.sha256)
        index = _index(record, content)
        shards = 1 if index is None else len(index.shards)
        if shards != plan.shards or (index is not None and index.adapter != plan.adapter):
            raise Conflict(
                "CHECKPOINT_MISMATCH",
                f"the checkpoint of version {record.version} is of another adapter, or in {shards} shards",
                limit=f"{plan.shards} shards",
                actual=shards,
            )
        return content if index is None else _read_shard(self._storage, record, index, number)

    async def _store_index(self, gathering: _Gathering, version: int, key: str) -> None:
        stored = gathering.stored.pop(version)
        shards = tuple(stored[number] for number in sorted(stored))
        index = ShardIndex(version=version, adapter=gathering.adapter, shards=shards)
        content = index.model_dump_json().encode()
        await self._put(key, content)
        digest = hashlib.sha256(content).hexdigest()
        whole = StoredShard(bytes=sum(shard.bytes for shard in shards), sha256=digest)
        await self._record(gathering.lease, version, key, whole)

    async def _record(self, lease: Lease, version: int, key: str, whole: StoredShard) -> None:
        record = CheckpointRecord(
            job_id=lease.job_id,
            version=version,
            epoch=lease.epoch,
            storage_key=key,
            bytes=whole.bytes,
            sha256=whole.sha256,
        )
        check = self.to_check(record)
        await until_available(lambda: self._store.checkpoints.record(record, check=check))
        self.on_recorded(record)  # first: whoever wakes by the next line may ask what is to be checked
        self._book.checkpointed(lease, version)
        await self.retire(lease.job_id)

    async def retire(self, job_id: str) -> None:
        """Delete what of the job's checkpoints need not be kept."""
        await retire(
            job_id,
            store=self._store,
            storage=self._storage,
            settings=self._retention,
            keep=self.needed(job_id),
        )

    async def _put(self, key: str, content: Encoded) -> None:
        await until_available(lambda: asyncio.to_thread(self._storage.put, key, content))


def read_checkpoint(storage: ObjectStorage, record: CheckpointRecord) -> bytes:
    """The checkpoint of the whole adapter, sharded or not. Raises Unavailable `CHECKPOINT_DAMAGED`."""
    content = _read(storage, record, record.storage_key, record.sha256)
    index = _index(record, content)
    if index is None:
        return content
    shards = [_read_shard(storage, record, index, number) for number in range(len(index.shards))]
    return join_checkpoints(index.adapter, shards)


def check_chained(content: Encoded, link: RecordedLink) -> None:
    """The checkpoint holds the very weights that the job's update chain has at this version.

    Raises Conflict `CHECKPOINT_UNCHAINED`, InvalidInput `CHECKPOINT_INVALID`.
    """
    checkpoint = decode_checkpoint(content)
    if checkpoint.version != link.version or not link.holds([checkpoint.weights_P.data.cast("B")]):
        raise Conflict(
            "CHECKPOINT_UNCHAINED",
            f"a checkpoint of version {checkpoint.version} does not hold the weights that were recorded",
            limit=f"version {link.version}, link {link.digest.hex()[:16]}",
        )


def _index(record: CheckpointRecord, content: bytes) -> ShardIndex | None:
    return ShardIndex.model_validate_json(content) if record.storage_key.endswith(INDEX_SUFFIX) else None


def _read_shard(storage: ObjectStorage, record: CheckpointRecord, index: ShardIndex, number: int) -> bytes:
    return _read(storage, record, shard_key(record.storage_key, number), index.shards[number].sha256)


def _read(storage: ObjectStorage, record: CheckpointRecord, key: str, sha256: str) -> bytes:
    content = storage.get(key)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise Unavailable(
            "CHECKPOINT_DAMAGED",
            f"the checkpoint of version {record.version} is not what was stored",
            remedy="Export another version: `cola jobs checkpoints` lists them.",
        )
    return content
