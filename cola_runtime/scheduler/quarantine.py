"""Puts devices out that were found wrong, and takes back what they have made."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque

from cola_runtime.jobs.audit import AuditEntry
from cola_runtime.jobs.store import JobStore
from cola_runtime.scheduler.device_pool import DevicePool
from cola_runtime.scheduler.leases import LeaseBook
from cola_runtime.scheduler.patience import until_available

STRIKES = 3
STRIKE_SECONDS = 3600.0
STRIKING = frozenset({
    "FRAME_CHECKSUM",
    "CHECKPOINT_UNCHAINED",
    "UPDATE_CHAIN_BROKEN",
    "UPDATE_NOT_RECORDED",
    "UPDATE_REPLACED",
    "UPDATE_ROLLED_BACK",
})  # fmt: skip
"""What a sound device on a sound network never causes, and a damaged one again and again."""

logger = logging.getLogger(__name__)


class QuarantineDesk:
    """Belongs to the coordinator's event loop."""

    def __init__(self, *, pool: DevicePool, book: LeaseBook, store: JobStore) -> None:
        self._pool, self._book, self._store = pool, book, store
        self._strikes: dict[str, deque[float]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def strike(self, device_id: str, reason: str) -> None:
        """One of `STRIKING` came from the device; with the third in an hour it is put out."""
        if reason not in STRIKING:
            return
        now = time.monotonic()
        strikes = self._strikes.setdefault(device_id, deque(maxlen=STRIKES))
        strikes.append(now)
        if len(strikes) == STRIKES and now - strikes[0] <= STRIKE_SECONDS:
            del self._strikes[device_id]
            message = f"{STRIKES} times within an hour, the last one: {reason}"
            task = asyncio.create_task(self.put_out(device_id, reason, message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def put_out(self, device_id: str, reason: str, message: str) -> None:
        """Its streams end, it is not let in again, and its jobs go back to before what it may have spoilt."""
        registry = self._store.devices
        first, doubtful = await until_available(lambda: registry.quarantine(device_id, reason, message))
        under_way = [self._end_all_of(device_id, reason, message, doubtful)]
        if first:
            logger.error("device %s put out: %s", device_id, message, extra={"event": "device.quarantined"})
            # At once, not behind streams that end: a coordinator that stops meanwhile has written it down.
            under_way.append(self._tell(device_id, f"{reason}: {message}"))
        await asyncio.gather(*under_way)

    async def _end_all_of(self, device_id: str, reason: str, message: str, doubtful: list[str]) -> None:
        await self._pool.dismiss(device_id, f"it is in quarantine: {reason}")
        for job_id in doubtful:  # also those that went on elsewhere, from what it had made
            lease = self._book.current(job_id)
            if lease is not None:
                self._book.lose(lease, reason="DEVICE_QUARANTINED", message=f"{device_id}: {message}")

    async def _tell(self, device_id: str, message: str) -> None:
        entry = AuditEntry(kind="device.quarantined", actor="coordinator", subject=device_id, message=message)
        await until_available(lambda: self._store.audit.write(entry))
