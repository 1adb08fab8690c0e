"""What the coordinator last knew of jobs and keys: reads are answered from it while the database is away.

Only what the job store itself said is remembered, and no more than so much. A job is marked as stale; a key
opens for a short time after it was last verified, and nothing once it was revoked here or has expired.
Writes, and reads of anything else, go to the store and fail with it.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Generic, TypeVar

from cola_runtime import ids
from cola_runtime.errors import Conflict, Unavailable
from cola_runtime.jobs.database import OUTAGES, unreachable
from cola_runtime.jobs.records import ApiKey, JobRecord

if TYPE_CHECKING:
    from cola_runtime.jobs.store import JobStore

MOST_JOBS = 10_000
MOST_KEYS = 1_000
KEY_SECONDS = 300.0
READ_SECONDS = 5.0  # a database that does not answer is away, too
SILENT_READ_SECONDS = 0.5  # once it was

Value = TypeVar("Value")
Answer = TypeVar("Answer")


class Newest(Generic[Value]):
    """The values noted last, by name."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.values: OrderedDict[str, Value] = OrderedDict()

    def note(self, name: str, value: Value) -> None:
        self.values[name] = value
        self.values.move_to_end(name)
        while len(self.values) > self._most:
            self.values.popitem(last=False)


class Memory:
    """Belongs to the event loop. Jobs by id; keys by their digest, with the time they were verified."""

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._jobs = Newest[JobRecord](MOST_JOBS)
        self._keys = Newest[tuple[ApiKey, float]](MOST_KEYS)
        self.quarantined: tuple[str, ...] = ()  # devices

    def note_jobs(self, jobs: Iterable[JobRecord]) -> None:
        for job in jobs:
            self._jobs.note(job.job_id, job)

    def note_key(self, key: str, found: ApiKey | None) -> None:
        """What the store said of a key: whose it is, or that it opens nothing."""
        digest = ids.api_key_digest(key)
        if found is None:
            self._keys.values.pop(digest, None)
        else:
            self._keys.note(digest, (found, self._now()))

    def forget_key(self, key_id: str) -> None:
        for digest in [digest for digest, (key, _) in self._keys.values.items() if key.key_id == key_id]:
            del self._keys.values[digest]

    def key(self, key: str) -> ApiKey | None:
        found, verified_at = self._keys.values.get(ids.api_key_digest(key), (None, 0.0))
        return found if self._now() - verified_at <= KEY_SECONDS else None

    def jobs_of(self, tenant_id: str) -> list[JobRecord]:
        """Newest first, marked as stale."""
        of_tenant = [job for job in self._jobs.values.values() if job.tenant_id == tenant_id]
        of_tenant.sort(key=lambda job: (job.created_at, job.job_id), reverse=True)
        return [replace(job, stale=True) for job in of_tenant]


class Reads:
    """Asks the store, and a memory of it while the store is away."""

    def __init__(self) -> None:
        self.silent = False
        """The store did not answer when it was last asked."""

    async def ask(
        self, ask: Callable[[], Awaitable[Answer]], recalled: Callable[[Unavailable], Answer]
    ) -> Answer:
        """What `ask` answers; of a store that is away or silent, what `recalled` makes of that."""
        try:
            async with asyncio.timeout(SILENT_READ_SECONDS if self.silent else READ_SECONDS):
                answer = await ask()
        except TimeoutError:
            self.silent = True
            return recalled(unreachable())
        except Unavailable as error:
            if error.reason not in OUTAGES:
                raise
            return recalled(error)
        self.silent = False
        return answer


class Recall:
    """Reads of the store, and of its memory while the database is away."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._reads = Reads()

    @property
    def degraded(self) -> str:
        """Why answers may be stale, or writes refused; empty while all is well."""
        outage = unreachable() if self._reads.silent else self._store.outage
        return "" if outage is None else f"{outage.reason}: {outage.message}"

    async def authenticate(self, key: str) -> ApiKey | None:
        """As the store's; of a key that was verified a short time ago also without the database."""

        def recalled(outage: Unavailable) -> ApiKey:
            found = self._store.remembered_key(key)
            if found is None:
                raise outage
            return found

        return await self._reads.ask(lambda: self._store.authenticate(key), recalled)

    async def quarantined_devices(self) -> tuple[str, ...]:
        """Names; without the database, those that it had when it was last asked."""

        async def ask() -> tuple[str, ...]:
            found = tuple(each.device_id for each in await self._store.devices.quarantines())
            self._store.memory.quarantined = found
            return found

        return await self._reads.ask(ask, lambda _: self._store.memory.quarantined)

    async def find_job(self, tenant_id: str, ref: str) -> JobRecord:
        """As the store's. A job that nobody remembers is no unknown one: Unavailable."""

        def recalled(outage: Unavailable) -> JobRecord:
            jobs = self._store.memory.jobs_of(tenant_id)
            for fits in (
                [job for job in jobs if job.job_id == ref],
                [job for job in jobs if job.name == ref],
                [job for job in jobs if ref and job.job_id.startswith(ref)],
            ):
                if len(fits) > 1:
                    raise Conflict("REFERENCE_AMBIGUOUS", f"{ref[:200]!r} fits several jobs")
                if fits:
                    return fits[0]
            raise outage

        return await self._reads.ask(lambda: self._store.find_job(tenant_id, ref), recalled)

    async def jobs(self, tenant_id: str, *, limit: int, after: str | None) -> list[JobRecord]:
        """As the store's; without the database, those that are remembered."""

        def recalled(outage: Unavailable) -> list[JobRecord]:
            jobs = self._store.memory.jobs_of(tenant_id)
            places = {job.job_id: place for place, job in enumerate(jobs)}
            if after is not None and after not in places:
                raise outage
            first = 0 if after is None else places[after] + 1
            return jobs[first : first + limit]

        return await self._reads.ask(
            lambda: self._store.jobs(tenant_id=tenant_id, limit=limit, after=after), recalled
        )
