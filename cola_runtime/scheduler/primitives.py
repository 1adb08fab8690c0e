"""What can be done with an adapter: open, forward, take and apply a step, checkpoint, close.

A job is a driver over these (driver.py); another front door would be another driver. Every wait ends: by
the result, by LeaseLost when device or base model are gone, or by its deadline.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

from cola_runtime import crash_points
from cola_runtime.adapter_spec import LeaseTerms
from cola_runtime.data.held_out import HeldOutPrompts
from cola_runtime.encodings import TapPlan
from cola_runtime.errors import ColaError, NotFound
from cola_runtime.jobs.bank_size import limited_bytes
from cola_runtime.jobs.plan import TrainingPlan
from cola_runtime.jobs.records import CheckpointRecord, JobRecord
from cola_runtime.jobs.store import JobStore
from cola_runtime.rows import Row
from cola_runtime.scheduler.checkpoints import CheckpointShelf
from cola_runtime.scheduler.device_pool import DevicePool
from cola_runtime.scheduler.leases import LeaseBook, LeaseLost
from cola_runtime.scheduler.packing import first_prompts
from cola_runtime.scheduler.placement import Demand
from cola_runtime.scheduler.replicas import Replica, ReplicaSet
from cola_runtime.scheduler.spot_checks import SpotChecks
from cola_runtime.scheduler.tickets import Computed
from cola_runtime.scheduler.waiting import Due
from cola_runtime.types import Gang, Lease, Segment, StepApplied
from cola_runtime.update_chain import RecordedLink

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_SECONDS = 120.0  # device builds or restores the adapter and its weights reach the bank
APPLY_TIMEOUT_SECONDS = 600.0  # a device that holds its stream open and answers heartbeats may be slow
CHECKPOINT_TIMEOUT_SECONDS = 120.0

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class LeasedAdapter:
    """An adapter that a device holds and whose `version` is current in the bank."""

    lease: Lease
    replica: Replica  # that computes its rows
    tenant_id: str
    plan: TrainingPlan
    taps: TapPlan
    gang: Gang | None = None
    version: int
    due: Due | None = None  # as of its present step


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    loss_sum: float
    weight_sum: float
    predictions: tuple[float, ...] = ()  # of labelled rows that were not trained on
    base_seconds: float = 0.0  # the rows' share of their base steps

    @property
    def mean(self) -> float:
        return self.loss_sum / self.weight_sum if self.weight_sum else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenStep:
    """A step whose taps have left the base model; the device applies it when it has them."""

    version: int  # after the step
    loss: Loss


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    loss: Loss
    applied: StepApplied


class AdapterPrimitives:
    """The one path through scheduler, base model and devices; of one base model."""

    def __init__(
        self,
        *,
        replicas: ReplicaSet,
        pool: DevicePool,
        book: LeaseBook,
        store: JobStore,
        checkpoints: CheckpointShelf,
        checks: SpotChecks,
    ) -> None:
        self._replicas, self._pool, self._book = replicas, pool, book
        self._store, self._checkpoints, self._checks = store, checkpoints, checks

    async def open(self, record: JobRecord, plan: TrainingPlan) -> LeasedAdapter:
        """Lease the adapter to a device (one per shard), from the newest usable checkpoint or from its seed.

        Steps above the checkpoint leave the record and are computed again.
        """
        lease, replica = await self._take_lease(record.job_id, plan)
        membership = plan.membership(record.job_id)
        adapter = LeasedAdapter(
            lease=lease,
            replica=replica,
            tenant_id=record.tenant_id,
            plan=plan,
            taps=plan.taps,
            gang=membership.gang if membership else None,
            version=0,
        )
        try:
            # Now, not before it had a device: meanwhile a checkpoint may have been taken back.
            usable, links = await self._checkpoints.newest_good(record, plan) or (None, ())
            adapter.version = usable.version if usable else 0
            if adapter.version < record.version:
                await self._store.rewind(lease, adapter.version)
            self.recorded(adapter)
            if usable is not None:
                self._book.checkpointed(lease, usable.version)
            terms = LeaseTerms(
                spec=plan.adapter, membership=membership, max_staleness=plan.max_staleness, origins=links
            )
            replica.loop.note_adapter(record.job_id, limited_bytes(plan, replica.description))
            await replica.base.lease(lease, terms)
            crash_points.reach("lease.base_told")
            await self._grant(adapter, usable, links)
            crash_points.reach("lease.device_told")
            await self._book.wait_version(lease, adapter.version, timeout_seconds=OPEN_TIMEOUT_SECONDS)
        except BaseException:
            await self.close(adapter)
            raise
        return adapter

    async def _take_lease(self, job_id: str, plan: TrainingPlan) -> tuple[Lease, Replica]:
        """One at a time, so that each sees the load that the ones before it have put on the devices."""
        demand = Demand.of(plan)
        while True:
            # not while placing: others may have a device already
            await self._replicas.wait_ready()
            await self._pool.choice.wait_able(job_id, demand, plan.shards)
            async with self._pool.choice.placing:
                device_ids = self._pool.choice.pick(job_id, demand, plan.shards)
                replica = self._replicas.place(job_id, plan) if device_ids else None
                if replica is not None:
                    lease = await self._store.grant_lease(job_id, *device_ids, replica=replica.name)
                    self._book.open(lease, replica=replica.name)
                    return lease, replica

    async def _grant(
        self, adapter: LeasedAdapter, usable: CheckpointRecord | None, links: Sequence[RecordedLink]
    ) -> None:
        """To each shard's device, one after the other: one of the checkpoints at a time is in memory."""
        lease, plan = adapter.lease, adapter.plan
        endpoint = adapter.replica.description.gradient_endpoint
        self._checkpoints.expect(lease, plan.adapter)
        for number, (part, of_shard) in enumerate(zip(lease.parts, plan.of_shards(), strict=True)):
            blob = None
            if usable is not None:
                blob = await asyncio.to_thread(self._checkpoints.read_shard, usable, plan, number)
            chain = links[number].digest if links else b""
            device = self._pool.device(part)
            await device.grant(part, of_shard, checkpoint=blob, gradient_endpoint=endpoint, chain=chain)

    async def forward(self, adapter: LeasedAdapter, rows: Sequence[Row]) -> Loss:
        """Losses of rows under the adapter's current version; nothing is trained."""
        segments = [
            Segment(
                lease=adapter.lease,
                version=adapter.version,
                rows=part,
                loss_denominator=1.0,
                gang=adapter.gang,
            )
            for part in adapter.replica.loop.parts(rows)
        ]
        computed = await self._compute(adapter, segments, train=False)
        return _total(computed)

    async def answer(self, adapter: LeasedAdapter, asked: HeldOutPrompts) -> list[list[int]]:
        """Greedy answers under the adapter's current version.

        In parts that fill a base step's token budget with prompts and answers, one after the other: each is a
        turn of the base model's compute thread, and whatever else waits there goes in between. Their tokens
        count against the tenant's share of base steps.
        """
        answers: list[list[int]] = []
        loop = adapter.replica.loop
        while len(answers) < len(asked.prompts):
            part = first_prompts(
                asked.prompts[len(answers) :],
                new_tokens=asked.max_new_tokens,
                token_budget=loop.token_budget,
            )
            answers += await self._answer_part(adapter, part, asked)
            loop.charge(adapter.tenant_id, len(part) * (max(map(len, part)) + asked.max_new_tokens))
        return answers

    async def _answer_part(
        self, adapter: LeasedAdapter, part: Sequence[Sequence[int]], asked: HeldOutPrompts
    ) -> list[list[int]]:
        self._book.check(adapter.lease)
        generating = adapter.replica.base.generate(
            adapter.lease.job_id,
            part,
            checkpoint=None,
            max_new_tokens=asked.max_new_tokens,
            temperature=0.0,
            seed=0,
            stop_ids=asked.stop_ids,
        )
        try:
            return await self._unless_lost(adapter.lease, asyncio.ensure_future(generating))
        except NotFound as gone:  # with the base model that held it
            raise LeaseLost(adapter.lease, gone.reason, gone.message) from gone

    def base_seconds(self, microbatches: Sequence[Sequence[Row]]) -> float:
        """What these rows should take in base steps."""
        tokens = sum(row.length for microbatch in microbatches for row in microbatch)
        return self._replicas.base_seconds(tokens)

    async def take(
        self,
        adapter: LeasedAdapter,
        microbatches: Sequence[Sequence[Row]],
        *,
        version: int,
        staleness: int = 0,
    ) -> TakenStep:
        """Compute a step's rows at `version`; their taps train the version that is `staleness` steps on."""
        parts = [part for microbatch in microbatches for part in adapter.replica.loop.parts(microbatch)]
        denominator = sum(row.loss_weight for part in parts for row in part)
        retained = self._checks.retains(
            adapter.lease, adapter.plan, version + staleness, replica=adapter.replica
        )
        segments = [
            Segment(
                lease=adapter.lease,
                version=version,
                rows=part,
                loss_denominator=denominator,
                taps=adapter.taps,
                microbatch=i,
                last_microbatch=i == len(parts) - 1,
                staleness=staleness,
                gang=adapter.gang,
                loss_scaling=adapter.plan.loss_scaling,
                retained=retained,
            )
            for i, part in enumerate(parts)
        ]
        first_rows = accumulate((len(part) for part in parts[:-1]), initial=0)
        segments = [replace(s, first_row=row) for s, row in zip(segments, first_rows, strict=True)]
        computed = await self._compute(adapter, segments, train=True)
        return TakenStep(version=version + staleness + 1, loss=_total(computed))

    async def apply(self, adapter: LeasedAdapter, taken: TakenStep) -> StepOutcome:
        """Return when the device has applied the step and its new version is current."""
        applied = await self._book.wait_version(
            adapter.lease, taken.version, timeout_seconds=APPLY_TIMEOUT_SECONDS
        )
        adapter.version = applied.version
        return StepOutcome(loss=taken.loss, applied=applied)

    def move_asked(self, adapter: LeasedAdapter) -> str:
        """Why the adapter should go to another device or replica at this step boundary, or "".

        Other jobs may have ended or moved since it was asked: one that would be placed where it is stays.
        """
        why = self._book.move_asked(adapter.lease)
        if why and self._would_stay(adapter):
            self._book.ask_move(adapter.lease, "")
            return ""
        return why

    def _would_stay(self, adapter: LeasedAdapter) -> bool:
        lease, plan = adapter.lease, adapter.plan
        devices = self._pool.choice.pick(lease.job_id, Demand.of(plan), plan.shards)
        return tuple(devices) == lease.device_ids and self._replicas.of(lease.job_id) is adapter.replica

    def recorded(self, adapter: LeasedAdapter) -> None:
        """The job store holds the adapter's version; a checkpoint of it may be recorded now."""
        self._book.recorded(adapter.lease, adapter.version)

    def draining(self, lease: Lease) -> bool:
        """One of the lease's devices wants to leave, and waits until its adapters are elsewhere."""
        return any(map(self._pool.draining, lease.device_ids))

    async def checkpoint(self, adapter: LeasedAdapter) -> None:
        """Return when a checkpoint of the adapter's current version is stored and recorded."""
        if not self._book.has_checkpoint(adapter.lease, adapter.version):
            for part in adapter.lease.parts:
                await self._pool.device(part).request_checkpoint(part)
        await self.wait_checkpoint(adapter)

    async def wait_checkpoint(self, adapter: LeasedAdapter) -> None:
        await self._book.wait_checkpoint(
            adapter.lease, adapter.version, timeout_seconds=CHECKPOINT_TIMEOUT_SECONDS
        )

    async def settle(self, adapter: LeasedAdapter) -> None:
        """Return when no spot check of the job is under way. Raises LeaseLost if one put its device out."""
        await self._checks.settle(adapter.lease.job_id)
        self._book.check(adapter.lease)

    async def close(self, adapter: LeasedAdapter) -> None:
        """Give the lease back. The bank keeps the weights for generation until they are evicted."""
        self._book.close(adapter.lease)
        self._checkpoints.forget(adapter.lease)
        adapter.replica.loop.forget_adapter(adapter.lease.job_id)
        for ending in (
            *(self._pool.end(part) for part in adapter.lease.parts),
            adapter.replica.base.end_lease(adapter.lease.job_id, adapter.lease.epoch),
        ):
            try:
                await ending
            except (ColaError, OSError) as error:
                logger.info("lease end not delivered: %s", error, extra={"event": "lease.end_undelivered"})
        await self._checks.closed(adapter.lease)

    async def _compute(
        self, adapter: LeasedAdapter, segments: list[Segment], *, train: bool
    ) -> list[Computed]:
        self._book.check(adapter.lease)
        together = asyncio.gather(
            *(
                adapter.replica.loop.compute(
                    segment,
                    tenant_id=adapter.tenant_id,
                    train=train,
                    priority=adapter.plan.priority,
                    due=adapter.due,
                )
                for segment in segments
            )
        )
        computed = await self._unless_lost(adapter.lease, together)
        for entry in computed:
            if entry.loss.reason is not None:
                raise LeaseLost(
                    adapter.lease, entry.loss.reason, f"the base model refused a segment: {entry.loss.reason}"
                )
        return computed

    async def _unless_lost(self, lease: Lease, work: asyncio.Future[T]) -> T:
        """`await work`, cancelled with LeaseLost as soon as the lease goes."""
        watch = asyncio.create_task(self._book.wait_lost(lease))
        try:
            futures: set[asyncio.Future[Any]] = {work, watch}
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise watch.result()
        finally:
            watch.cancel()
            work.cancel()
            await asyncio.gather(watch, work, return_exceptions=True)


def _total(computed: Sequence[Computed]) -> Loss:
    return Loss(
        loss_sum=sum(c.loss.loss_sum for c in computed),
        weight_sum=sum(c.loss.weight_sum for c in computed),
        predictions=tuple(value for c in computed for value in c.loss.predictions),
        base_seconds=sum(c.base_seconds for c in computed),
    )
