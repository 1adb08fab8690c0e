"""Which connected device trains which job: asks `placement` with what the devices said last."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from cola_runtime.job_choices import TrustClass
from cola_runtime.scheduler.connected_device import ConnectedDevice
from cola_runtime.scheduler.leases import LeaseBook
from cola_runtime.scheduler.placement import Demand, Offer, place, rebalance


class DeviceChoice:
    """`devices` are the pool's, by id, as they come and go.

    Who changes what there is to choose from notifies `joined`.
    """

    def __init__(
        self,
        devices: Mapping[str, ConnectedDevice],
        *,
        joined: asyncio.Condition,
        book: LeaseBook,
        rebalance_seconds: float,
    ) -> None:
        self._devices, self._joined, self._book = devices, joined, book
        self._rebalance_seconds = rebalance_seconds
        self._demands: dict[str, Demand] = {}  # of jobs that were placed
        self._moved = time.monotonic()  # when a job was last asked to move
        self.placing = asyncio.Lock()  # one job at a time, so that each sees the load of those before it

    async def wait_able(self, job_id: str, demand: Demand, count: int) -> None:
        """Return when so many devices are connected that may and can train the job, as far as is known."""
        self._demands[job_id] = demand
        try:
            async with self._joined:
                await self._joined.wait_for(lambda: len(self.pick(job_id, demand, count)) >= count)
        except asyncio.CancelledError:
            self._demands.pop(job_id, None)
            raise

    def pick(self, job_id: str, demand: Demand, count: int) -> list[str]:
        """The able devices that would be through first (`placement.place`); none if there are too few."""
        return place(job_id, demand, self._offers(job_id), count)

    def unable(self, job_id: str) -> str:
        """Which of the connected devices cannot or may not train the job, and why; "" if each may."""
        if not self._devices:
            return "no device is connected"
        refusals = {device_id: device.unable.get(job_id) for device_id, device in self._devices.items()}
        demand = self._demands.get(job_id)
        if demand is not None:
            refusals |= {offer.device_id: offer.refusal(demand) for offer in self._offers(job_id)}
        found = "; ".join(f"{device_id} cannot train it: {why}" for device_id, why in refusals.items() if why)
        draining = all(device.draining for device in self._devices.values())
        return found or ("all devices are draining" if draining else "")

    def forget(self, job_id: str) -> None:
        """Its lease ends: what it needs counts no more."""
        self._demands.pop(job_id, None)

    def trusted_beside(self, device_id: str) -> str | None:
        """The trusted device with the fewest leases, other than this one; None: there is none."""
        able = [
            name
            for name, device in self._devices.items()
            if name != device_id and device.admission.trust is TrustClass.TRUSTED and not device.draining
        ]
        return min(able, key=lambda name: (len(self._book.on_device(name)), name), default=None)

    async def wait_trusted_beside(self, device_id: str) -> str:
        """As `trusted_beside`, as soon as there is one."""
        async with self._joined:
            await self._joined.wait_for(lambda: self.trusted_beside(device_id) is not None)
            found = self.trusted_beside(device_id)
        assert found is not None, "nothing ran in between"
        return found

    def rebalance(self) -> None:
        """Ask one job to move, if that is worth it and the last move is long enough ago."""
        if time.monotonic() - self._moved < self._rebalance_seconds:
            return
        leases = [lease for device_id in self._devices for lease in self._book.on_device(device_id)]
        movable = frozenset(lease.job_id for lease in leases if not lease.further_device_ids)
        move = rebalance(self._offers(""), movable)
        lease = None if move is None else self._book.current(move.job_id)
        if move is None or lease is None or move.job_id in self._devices[move.target].unable:
            return
        self._moved = time.monotonic()
        self._book.ask_move(lease, f"from device {move.source}, which has more to do, towards {move.target}")

    def _offers(self, job_id: str) -> list[Offer]:
        """Of the devices that take new leases and have not refused this job for good."""
        return [
            device.offer([lease.job_id for lease in self._book.on_device(device_id)], self._demands)
            for device_id, device in self._devices.items()
            if not device.draining and job_id not in device.unable
        ]
