"""A sharded adapter's checkpoint is there when every shard's is, and is read back for what it is."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from cola_runtime.adapter_spec import LoraKind
from cola_runtime.adapters.checkpoint_format import decode_checkpoint
from cola_runtime.device.session import AdapterSession, TrainingDefinition
from cola_runtime.errors import Conflict, Unavailable
from cola_runtime.jobs.plan import TrainingPlan
from cola_runtime.jobs.records import NewJob
from cola_runtime.jobs.state import Trigger
from cola_runtime.jobs.store import JobStore
from cola_runtime.scheduler.checkpoints import CheckpointShelf, read_checkpoint
from cola_runtime.scheduler.leases import LeaseBook, LeaseLost
from cola_runtime.storage.objects import ObjectStorage
from cola_runtime.types import Lease
from tests.device.adapter_samples import definition, kinds_spec

TRAINING = definition(spec=kinds_spec())
PLAN = TrainingPlan(
    adapter=TRAINING.spec,
    optimizer=TRAINING.optimizer,
    schedule=TRAINING.schedule,
    checkpoint_every=1,
    max_staleness=0,
    shards=2,
)


class Shelf:
    """A shelf with a store, a running job and a sharded lease of it."""

    def __init__(self, store: JobStore, folder: Path) -> None:
        self.store = store
        self.storage = ObjectStorage(f"file://{folder / 'objects'}")
        self.book = LeaseBook()
        self.shelf = CheckpointShelf(book=self.book, store=store, storage=self.storage)
        self.lease: Lease

    async def lease_anew(self, job_id: str) -> None:
        self.lease = await self.store.grant_lease(job_id, "d1", "d2")
        self.book.open(self.lease, replica="tiny/0")
        self.book.recorded(self.lease, 0)
        self.shelf.expect(self.lease, PLAN.adapter)

    async def hand_on(self, shard: int, *, lease: Lease | None = None) -> None:
        content = checkpoint_of(PLAN.of_shards()[shard])
        digest = hashlib.sha256(content).hexdigest()
        await self.shelf.store((lease or self.lease).parts[shard], 0, content, digest)


def checkpoint_of(plan: TrainingPlan) -> bytes:
    training = TrainingDefinition(spec=plan.adapter, optimizer=plan.optimizer, schedule=plan.schedule)
    return AdapterSession.create(training).checkpoint()


@pytest.fixture
async def shelf(tmp_path: Path) -> AsyncIterator[Shelf]:
    store = await JobStore.open(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    tenant = await store.create_tenant("acme")
    new = NewJob(
        tenant_id=tenant.tenant_id,
        name="large",
        base_model="tiny",
        spec_json="{}",
        total_steps=5,
        encoding="adapter_gradient",
        training_key="datasets/x/training.jsonl",
        request_digest="d",
    )
    job = await store.create_job(new)
    await store.transition(job.job_id, Trigger.START)
    shelf = Shelf(store, tmp_path)
    await shelf.lease_anew(job.job_id)
    yield shelf
    await store.close()


async def test_half_a_checkpoint_is_none(shelf: Shelf) -> None:
    await shelf.hand_on(1)
    assert await shelf.store.checkpoints.of(shelf.lease.job_id) == []
    assert not shelf.book.has_checkpoint(shelf.lease, 0)
    await shelf.hand_on(0)
    (record,) = await shelf.store.checkpoints.of(shelf.lease.job_id)
    assert shelf.book.has_checkpoint(shelf.lease, 0)
    assert record.bytes == sum(len(checkpoint_of(plan)) for plan in PLAN.of_shards())


async def test_halves_of_two_leases_do_not_make_one(shelf: Shelf) -> None:
    await shelf.hand_on(0)
    older = shelf.lease
    await shelf.lease_anew(older.job_id)
    await shelf.hand_on(1)
    with pytest.raises(LeaseLost):
        await shelf.hand_on(1, lease=older)
    assert await shelf.store.checkpoints.of(older.job_id) == []


async def test_each_device_gets_its_part_back_and_readers_the_whole(shelf: Shelf) -> None:
    await asyncio.gather(shelf.hand_on(0), shelf.hand_on(1))
    (record,) = await shelf.store.checkpoints.of(shelf.lease.job_id)
    for number, plan in enumerate(PLAN.of_shards()):
        assert shelf.shelf.read_shard(record, PLAN, number) == checkpoint_of(plan)
    assert read_checkpoint(shelf.storage, record) == checkpoint_of(PLAN)
    assert decode_checkpoint(read_checkpoint(shelf.storage, record)).definition.spec == PLAN.adapter


async def test_a_checkpoint_of_another_adapter_or_division_is_refused(shelf: Shelf) -> None:
    await asyncio.gather(shelf.hand_on(0), shelf.hand_on(1))
    (record,) = await shelf.store.checkpoints.of(shelf.lease.job_id)
    part = replace_kind(PLAN)
    for other in (replace(PLAN, shards=3), replace(PLAN, shards=1), part):
        with pytest.raises(Conflict) as caught:
            shelf.shelf.read_shard(record, other, 0)
        assert caught.value.reason == "CHECKPOINT_MISMATCH"


def replace_kind(plan: TrainingPlan) -> TrainingPlan:
    first, *others = plan.adapter.parts
    changed = first.model_copy(update={"kind": LoraKind(rank=5)})
    return replace(plan, adapter=plan.adapter.model_copy(update={"parts": (changed, *others)}))


async def test_a_damaged_shard_is_found_by_whoever_reads(shelf: Shelf) -> None:
    await asyncio.gather(shelf.hand_on(0), shelf.hand_on(1))
    (record,) = await shelf.store.checkpoints.of(shelf.lease.job_id)
    shard = next(key for key in shelf.storage.list("checkpoints/") if key.endswith("-1.safetensors"))
    shelf.storage.put(shard, shelf.storage.get(shard)[:-1] + b"\x01")
    shelf.shelf.read_shard(record, PLAN, 0)
    for read in (
        lambda: shelf.shelf.read_shard(record, PLAN, 1),
        lambda: read_checkpoint(shelf.storage, record),
    ):
        with pytest.raises(Unavailable) as caught:
            read()
        assert caught.value.reason == "CHECKPOINT_DAMAGED"
