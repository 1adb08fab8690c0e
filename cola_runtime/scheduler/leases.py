"""Leases that are open now, and who waits for what of them. Lives on the coordinator's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from cola_runtime.types import Lease, StepApplied


class LeaseLost(Exception):
    """The adapter's device or base model is gone, or refused; the job must lease again from a checkpoint."""

    def __init__(self, lease: Lease, reason: str, message: str) -> None:
        super().__init__(message)
        self.lease = lease
        self.reason = reason
        self.message = message


@dataclass(slots=True)
class _OpenLease:
    lease: Lease
    replica: str  # of the base model, that computes the adapter's rows
    applied: dict[int, StepApplied] = field(default_factory=dict)  # by version, what nobody has asked for yet
    recorded_version: int = -1
    checkpoint_version: int = -1
    lost: LeaseLost | None = None
    moving: str = ""  # why the job should lease anew at its next step boundary
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class LeaseBook:
    """Matches what the base model and the devices report with the coroutine that waits for it."""

    def __init__(self) -> None:
        self._open: dict[str, _OpenLease] = {}

    def open(self, lease: Lease, *, replica: str) -> None:
        self._open[lease.job_id] = _OpenLease(lease, replica)

    def close(self, lease: Lease) -> None:
        entry = self._entry(lease)
        if entry is not None:
            del self._open[lease.job_id]
            entry.changed.set()

    def on_device(self, device_id: str) -> list[Lease]:
        return [entry.lease for entry in self._open.values() if device_id in entry.lease.device_ids]

    def current(self, job_id: str) -> Lease | None:
        entry = self._open.get(job_id)
        return None if entry is None or entry.lost is not None else entry.lease

    def holds(self, device_id: str, part: Lease) -> bool:
        """The device holds a lease that is not lost, or the part of one, that `part` is."""
        current = self.current(part.job_id)
        return current is not None and current.covers(part) and part.device_id == device_id

    def applied(self, event: StepApplied) -> None:
        entry = self._entry(event.lease)
        if entry is not None:
            entry.applied[event.version] = event
            entry.changed.set()

    def recorded(self, lease: Lease, version: int) -> None:
        """The job store holds every step up to `version`."""
        entry = self._entry(lease)
        if entry is not None:
            entry.recorded_version = version
            entry.changed.set()

    def checkpointed(self, lease: Lease, version: int) -> None:
        entry = self._entry(lease)
        if entry is not None:
            entry.checkpoint_version = max(entry.checkpoint_version, version)
            entry.changed.set()

    def has_checkpoint(self, lease: Lease, version: int) -> bool:
        """A checkpoint of `version`, or of a later one, is stored and recorded."""
        entry = self._entry(lease)
        return entry is not None and entry.checkpoint_version >= version

    def lose(self, lease: Lease, *, reason: str, message: str) -> None:
        """Wake whoever waits on this lease with LeaseLost; later waits fail at once."""
        entry = self._entry(lease)
        if entry is not None and entry.lost is None:
            entry.lost = LeaseLost(lease, reason, message)
            entry.changed.set()

    def lose_device(self, device_id: str, *, reason: str, message: str) -> None:
        for lease in self.on_device(device_id):
            self.lose(lease, reason=reason, message=message)

    def lose_link(self, device_id: str, *, replica: str, reason: str, message: str) -> None:
        """The device's stream to a replica ended: leases are lost of which that has heard already.

        One that is being opened is not: the device sends its weights over whichever stream it has next. So a
        late word of the stream of a device that died costs nothing when it is back by then.
        """
        for lease in self.on_device(device_id):
            entry = self._open[lease.job_id]
            if entry.replica == replica and entry.applied:
                self.lose(lease, reason=reason, message=message)

    def lose_replica(self, replica: str, *, reason: str, message: str) -> None:
        for entry in [entry for entry in self._open.values() if entry.replica == replica]:
            self.lose(entry.lease, reason=reason, message=message)

    def ask_move(self, lease: Lease, why: str) -> None:
        """The job shall make a checkpoint at its next step boundary and lease anew; "" takes that back."""
        entry = self._entry(lease)
        if entry is not None:
            entry.moving = why

    def move_asked(self, lease: Lease) -> str:
        """Why the lease should end at the next step boundary, or ""."""
        entry = self._entry(lease)
        return "" if entry is None else entry.moving

    def check(self, lease: Lease) -> None:
        """Raise LeaseLost if the lease is gone."""
        entry = self._entry(lease)
        if entry is None:
            raise LeaseLost(lease, "LEASE_ENDED", "the lease is no longer open")
        if entry.lost is not None:
            raise entry.lost

    async def wait_lost(self, lease: Lease) -> LeaseLost:
        """Return once the lease is lost (for racing against other waits)."""
        while True:
            try:
                await self._wait_change(lease)
            except LeaseLost as lost:
                return lost

    async def wait_version(self, lease: Lease, version: int, *, timeout_seconds: float) -> StepApplied:
        """Wait until the bank holds `version`. LeaseLost when the lease goes, or on `timeout_seconds`."""
        async with _deadline(lease, timeout_seconds, f"version {version} did not reach the bank"):
            entry = await self._wait_until(lease, lambda e: version in e.applied)
        entry.applied = {later: event for later, event in entry.applied.items() if later >= version}
        return entry.applied[version]

    async def wait_recorded(self, lease: Lease, version: int, *, timeout_seconds: float) -> None:
        async with _deadline(lease, timeout_seconds, f"version {version} was not recorded"):
            await self._wait_until(lease, lambda e: e.recorded_version >= version)

    async def wait_checkpoint(self, lease: Lease, version: int, *, timeout_seconds: float) -> None:
        async with _deadline(lease, timeout_seconds, f"no checkpoint of version {version} arrived"):
            await self._wait_until(lease, lambda e: e.checkpoint_version >= version)

    async def _wait_until(self, lease: Lease, condition: Callable[[_OpenLease], bool]) -> _OpenLease:
        while True:
            self.check(lease)
            entry = self._open[lease.job_id]
            if condition(entry):
                return entry
            await self._wait_change(lease)

    async def _wait_change(self, lease: Lease) -> None:
        self.check(lease)
        entry = self._open[lease.job_id]
        entry.changed.clear()
        await entry.changed.wait()
        self.check(lease)

    def _entry(self, lease: Lease) -> _OpenLease | None:
        entry = self._open.get(lease.job_id)
        return entry if entry is not None and entry.lease.epoch == lease.epoch else None


class _deadline:
    """`asyncio.timeout` whose expiry reads as a lost lease: a silent device is a lost device."""

    def __init__(self, lease: Lease, seconds: float, what: str) -> None:
        self._lease, self._what = lease, f"{what} within {seconds:g} s"
        self._timeout = asyncio.timeout(seconds)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)  # type: ignore[arg-type]
        except TimeoutError as timeout:
            raise LeaseLost(self._lease, "LEASE_TIMEOUT", self._what) from timeout
