"""Makes a random share of a device's steps again on a trusted device, and puts out who made them wrong.

What is checked is a whole interval from one checkpoint to the next: both states are there anyway, so that the
device learns neither before nor afterwards that it was looked at. The base model keeps what it sent and what
came back; a trusted device starts from the first checkpoint (or the seed), gets the same taps, and must come
to the same weights at every version and to the same checkpoint at the end, optimizer state included. Of a
sharded adapter each device's steps are made again by themselves, with the norms of all as they were, and its
own norms compared, too. What is to be checked is recorded with the checkpoint at its end, so that a
coordinator which starts again makes it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cola_runtime import ids
from cola_runtime.adapter_spec import LeaseTerms
from cola_runtime.adapters.checkpoint_format import CheckpointContent, Encoded, decode_checkpoint
from cola_runtime.config import SpotCheckSettings
from cola_runtime.errors import ColaError, Unavailable
from cola_runtime.jobs.plan import TrainingPlan
from cola_runtime.jobs.records import CheckpointRecord
from cola_runtime.jobs.spot_check_rows import PendingCheck
from cola_runtime.jobs.store import JobStore
from cola_runtime.scheduler.device_pool import DevicePool
from cola_runtime.scheduler.leases import LeaseBook, LeaseLost
from cola_runtime.scheduler.patience import until_available
from cola_runtime.scheduler.quarantine import QuarantineDesk
from cola_runtime.scheduler.replicas import Replica
from cola_runtime.types import Lease, Replay

TOLERANCE = 1e-5
"""Relative, in the Euclidean norm: another processor may round otherwise. On the same one no bit differs."""

CHECK_SECONDS = 600.0
CHECKER_SECONDS = 30.0  # to wait for a trusted device
CHECKPOINT_SECONDS = 60.0
BACK_SECONDS = 120.0  # for a replica that is lost before or in a replay to be back
RETRY_SECONDS = 0.5
LOST = frozenset({"BASE_MODEL_LOST", "DEVICE_LOST", "DEVICE_LINK_LOST"})
"""What ends an attempt, and says nothing of the steps: another replay may get to its end."""

logger = logging.getLogger(__name__)
_random = random.SystemRandom()


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Steps under one lease, from the checkpoint of `first` (or the seed) to that of `last`."""

    lease: Lease
    replica: Replica  # that keeps what it sent for them, wherever the job is by now
    plan: TrainingPlan
    first: int
    last: int
    shards: tuple[int, ...]  # that are checked; none: the interval was not drawn

    @property
    def pending(self) -> PendingCheck:
        return PendingCheck(
            job_id=self.lease.job_id,
            epoch=self.lease.epoch,
            first=self.first,
            last=self.last,
            device_ids=self.lease.device_ids,
            shards=self.shards,
            replica=self.replica.name,
        )

    @property
    def end(self) -> tuple[str, int, int]:
        return self.lease.job_id, self.lease.epoch, self.last


class SpotChecks:
    """Belongs to the coordinator's event loop. `read` gives a shard of a checkpoint, blocking."""

    def __init__(
        self,
        settings: SpotCheckSettings,
        *,
        pool: DevicePool,
        book: LeaseBook,
        store: JobStore,
        desk: QuarantineDesk,
        read: Callable[[CheckpointRecord, TrainingPlan, int], bytes],
    ) -> None:
        self._settings = settings
        self._pool, self._book, self._store = pool, book, store
        self._desk, self._read = desk, read
        self._current: dict[str, Interval] = {}  # by job: the one that its newest step is in
        self._due: dict[tuple[str, int, int], Interval] = {}  # until the checkpoint at their end is recorded
        self._within: dict[tuple[str, int, int], CheckpointRecord] = {}  # the newest before such an end
        self._tasks: dict[asyncio.Task[None], Interval] = {}
        self._one_at_a_time = asyncio.Lock()
        self._arriving: dict[str, asyncio.Future[Encoded]] = {}  # replays' checkpoints, by the lease's job

    def retains(self, lease: Lease, plan: TrainingPlan, version: int, *, replica: Replica) -> bool:
        """The step that leaves `version` is in a drawn interval. To be asked of every step, in order."""
        current = self._current.get(lease.job_id)
        if current is None or current.lease != lease or version >= current.last:
            following = (version // plan.checkpoint_every + 1) * plan.checkpoint_every
            current = Interval(
                lease=lease,
                replica=replica,
                plan=plan,
                first=version,
                last=min(following, plan.schedule.total_steps),
                shards=self._drawn(lease),
            )
            self._current[lease.job_id] = current
            if current.shards:
                self._due[current.end] = current
        return bool(current.shards)

    def take_up(self, check: PendingCheck, plan: TrainingPlan, replica: Replica) -> None:
        """Make a check that the coordinator before this one did not get to."""
        first, *further = check.device_ids
        lease = Lease(
            job_id=check.job_id, epoch=check.epoch, device_id=first, further_device_ids=tuple(further)
        )
        interval = Interval(
            lease=lease,
            replica=replica,
            plan=plan,
            first=check.first,
            last=check.last,
            shards=check.shards,
        )
        self._begin(interval)

    def to_check(self, checkpoint: CheckpointRecord) -> PendingCheck | None:
        """What is to be recorded with the checkpoint: the drawn interval that it ends, or is within."""
        for each in self._due.values():
            of_lease = (each.lease.job_id, each.lease.epoch) == (checkpoint.job_id, checkpoint.epoch)
            if of_lease and each.first < checkpoint.version <= each.last:
                return replace(each, last=checkpoint.version).pending
        return None

    def recorded(self, checkpoint: CheckpointRecord) -> None:
        """A checkpoint is stored and recorded: a drawn interval that ends with it is checked now."""
        job_id, epoch, version = checkpoint.job_id, checkpoint.epoch, checkpoint.version
        interval = self._due.pop((job_id, epoch, version), None)
        if interval is not None:
            self._begin(interval)
            return
        for each in self._due.values():
            within = each.first < version < each.last
            if within and (each.lease.job_id, each.lease.epoch) == (job_id, epoch):
                self._within[each.end] = checkpoint

    def needed(self, job_id: str) -> set[int]:
        """Versions of the job whose checkpoints a check has yet to read."""
        intervals = [*self._due.values(), *self._tasks.values()]
        mine = [each for each in intervals if each.lease.job_id == job_id]
        within = {each.version for each in self._within.values() if each.job_id == job_id}
        return within | {version for each in mine for version in (each.first, each.last)}

    async def settle(self, job_id: str) -> None:
        """Return when no check of the job's steps is under way; it makes no further steps for now."""
        self._end_early([each for each in self._due.values() if each.lease.job_id == job_id])
        waiting = [task for task, interval in self._tasks.items() if interval.lease.job_id == job_id]
        if waiting:
            await asyncio.wait(waiting)

    async def closed(self, lease: Lease) -> None:
        """The lease has ended: what was retained of intervals that did not get to their end may go."""
        current = self._current.get(lease.job_id)
        if current is not None and current.lease == lease:
            del self._current[lease.job_id]
        left = [each for each in self._due.values() if each.lease == lease]
        for interval in self._end_early(left):
            del self._due[interval.end]
            await self._forget(interval)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    def arrived(self, lease: Lease, content: Encoded) -> bool:
        """A checkpoint came: True if it is of a replay, and so nobody else's."""
        waiting = self._arriving.get(lease.job_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(content)
        return waiting is not None

    def _begin(self, interval: Interval) -> None:
        task = asyncio.create_task(self._check(interval))
        self._tasks[task] = interval
        task.add_done_callback(self._tasks.pop)

    def _end_early(self, intervals: Sequence[Interval]) -> list[Interval]:
        """Check those that have a checkpoint within, up to there; returns the others.

        Else a device would only have to leave in time not to be checked.
        """
        others = []
        for interval in intervals:
            end = self._within.pop(interval.end, None)
            if end is None:
                others.append(interval)
            else:
                del self._due[interval.end]
                self._begin(replace(interval, last=end.version))
        return others

    def _drawn(self, lease: Lease) -> tuple[int, ...]:
        """Shards to check: if the interval is drawn, by the greatest share, all whose devices have one."""
        shares = [self._share(device_id) for device_id in lease.device_ids]
        if not _random.random() < max(shares):
            return ()
        return tuple(number for number, share in enumerate(shares) if share > 0)

    def _share(self, device_id: str) -> float:
        trust = self._pool.trust(device_id)
        return 0.0 if trust is None else float(getattr(self._settings, trust))

    async def _check(self, interval: Interval) -> None:
        """A check that is cut off by the coordinator's end stays recorded: the next one makes it."""
        passed = [await self._check_shard(interval, number) for number in interval.shards]
        if all(passed) and len(passed) == len(interval.lease.device_ids):
            job_id, last = interval.lease.job_id, interval.last
            await until_available(lambda: self._store.checkpoints.mark_checked(job_id, last))
        await until_available(lambda: self._store.checkpoints.forget_check(interval.pending))
        await self._forget(interval)

    async def _check_shard(self, interval: Interval, number: int) -> bool:
        """It came to the same result. If it came to another, its device has been put out."""
        try:
            async with self._one_at_a_time, asyncio.timeout(CHECK_SECONDS):
                deviation = await self._made_again(interval, number)
        except (ColaError, LeaseLost, TimeoutError) as error:
            message = f"not checked: {error or 'it took too long'}"
            await self._tell(interval, number, "undecided", message)
        except Exception:
            logger.exception("spot check failed", extra={"event": "spot_check.error"})
        else:
            return await self._judge(interval, number, deviation)
        return False

    async def _judge(self, interval: Interval, number: int, deviation: float) -> bool:
        if deviation <= TOLERANCE:
            exactly = "all bits" if deviation == 0 else f"within {deviation:.1e}"
            message = f"made again elsewhere with the same result ({exactly})"
            await self._tell(interval, number, "passed", message)
            return True
        message = f"made again elsewhere they differ by {deviation:.1e}, {TOLERANCE:.0e} is allowed"
        await self._tell(interval, number, "failed", message)
        named = f"steps {interval.first + 1} to {interval.last} of {interval.lease.job_id}"
        device_id = interval.lease.device_ids[number]
        await self._desk.put_out(device_id, "SPOT_CHECK_FAILED", f"{named}: {message}")
        return False

    async def _tell(self, interval: Interval, number: int, verdict: str, message: str) -> None:
        """An event of the job; it waits for a job store that is away, as what follows from it does."""
        device_id = interval.lease.device_ids[number]
        await until_available(
            lambda: self._store.add_event(
                interval.lease.job_id,
                f"spot_check.{verdict}",
                f"steps {interval.first + 1} to {interval.last} by {device_id}: {message}",
                level="info" if verdict == "passed" else "warning",
                data={"first": interval.first, "last": interval.last, "device_id": device_id},
            )
        )

    async def _made_again(self, interval: Interval, number: int) -> float:
        """As `_deviation`: a replica or a checker that dies meanwhile costs the attempt, not the check."""
        until: float | None = None
        while True:
            try:
                return await self._deviation(interval, number)
            except (ColaError, LeaseLost) as error:
                until = until or time.monotonic() + BACK_SECONDS
                if error.reason not in LOST or time.monotonic() > until:
                    raise
                logger.info("replay again: %s", error, extra={"event": "spot_check.again"})
            await asyncio.sleep(RETRY_SECONDS)

    async def _deviation(self, interval: Interval, number: int) -> float:
        """Of a shard's replay from what its device sent and handed on. Raises ColaError, LeaseLost."""
        start, end = await self._ends(interval, number)
        checker = await self._checker(interval.lease.device_ids[number])
        lease = Lease(job_id=ids.new_job_id(), epoch=1, device_id=checker)
        self._book.open(lease, replica=interval.replica.name)
        self._arriving[lease.job_id] = asyncio.get_running_loop().create_future()
        try:
            of_weights = await self._replay(interval, number, lease, start)
            made = await asyncio.wait_for(self._arriving[lease.job_id], CHECKPOINT_SECONDS)
            return max(of_weights, await asyncio.to_thread(checkpoint_distance, made, end))
        finally:
            del self._arriving[lease.job_id]
            self._book.close(lease)
            await self._end(lease, interval.replica)

    async def _replay(self, interval: Interval, number: int, lease: Lease, start: bytes | None) -> float:
        if not interval.replica.ready:  # what it last said of its port holds no more
            raise Unavailable(
                "BASE_MODEL_LOST", f"base model replica {interval.replica.name} is not back yet"
            )
        part, plan = interval.lease.parts[number], interval.plan.of_shards()[number]
        replay = Replay(lease=part, first=interval.first, last=interval.last)
        terms = LeaseTerms(spec=plan.adapter, max_staleness=plan.max_staleness, replay=replay)
        await interval.replica.base.lease(lease, terms)
        await self._pool.device(lease).grant(
            lease,
            replace(plan, checkpoint_every=0),
            checkpoint=start,
            gradient_endpoint=interval.replica.description.gradient_endpoint,
        )
        last = await self._book.wait_version(lease, interval.last, timeout_seconds=CHECK_SECONDS)
        if interval.last != plan.schedule.total_steps:  # of that one the device makes a checkpoint unasked
            await self._pool.device(lease).request_checkpoint(lease)
        return last.deviation

    async def _ends(self, interval: Interval, number: int) -> tuple[bytes | None, bytes]:
        """The shard's checkpoints that its steps began from (None: from the seed) and led to."""
        records = {each.version: each for each in await self._store.checkpoints.of(interval.lease.job_id)}
        found: list[bytes | None] = []
        for version in (interval.first, interval.last):
            if version == 0:
                found.append(None)
            elif version in records:
                found.append(await asyncio.to_thread(self._read, records[version], interval.plan, number))
            else:
                raise Unavailable("CHECKPOINT_DAMAGED", f"there is no checkpoint of version {version}")
        start, end = found
        assert end is not None, "an interval has a step"
        return start, end

    async def _checker(self, device_id: str) -> str:
        """A trusted device other than this one."""
        async with asyncio.timeout(CHECKER_SECONDS):
            return await self._pool.choice.wait_trusted_beside(device_id)

    async def _end(self, lease: Lease, replica: Replica) -> None:
        for ending in (self._pool.end(lease), replica.base.end_lease(lease.job_id, lease.epoch)):
            try:
                await ending
            except ColaError as error:
                logger.info("replay's end not delivered: %s", error, extra={"event": "lease.end_undelivered"})

    async def _forget(self, interval: Interval) -> None:
        job_id, epoch, last = interval.end
        try:
            await interval.replica.base.forget_steps(job_id, epoch, before=last)
        except ColaError as error:  # its files go after a day
            logger.info("retained steps not let go: %s", error, extra={"event": "spot_check.not_forgotten"})


def checkpoint_distance(made: Encoded, handed_on: Encoded) -> float:
    """The greatest relative distance of weights and of each optimizer state; 0 only for equal bytes."""
    if made == handed_on:
        return 0.0
    a, b = decode_checkpoint(made), decode_checkpoint(handed_on)
    if (a.definition, a.version) != (b.definition, b.version):
        return float("inf")
    ours, theirs = _vectors(a), _vectors(b)
    distances = [
        float(np.linalg.norm(ours[name] - theirs[name])) / max(float(np.linalg.norm(theirs[name])), 1e-300)
        for name in ours
    ]
    return max(*distances, 1e-300)


def _vectors(content: CheckpointContent) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """The weights, and each kind of optimizer state, in float64."""
    vectors = {"weights": content.weights_P, **content.states}
    return {name: vector.astype(np.float64) for name, vector in vectors.items()}
