"""What the coordinator knows of one device that has dialled in."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cola_runtime.proto import control_pb2
from cola_runtime.scheduler.placement import Demand, Offer
from cola_runtime.transport.stream import FrameStream

UNKNOWN_MEMORY_BYTES = 1 << 30
"""What a device is taken to have free until its first heartbeat, which comes at once."""


@dataclass(slots=True, kw_only=True)
class ConnectedDevice:
    hello: control_pb2.DeviceHello
    stream: FrameStream[Any]
    order: int
    heard: float  # time.monotonic()
    draining: bool = False
    busy_seconds: float = 0.0
    resident_bytes: int = 0
    free_bytes: int = UNKNOWN_MEMORY_BYTES
    unable: dict[str, str] = field(default_factory=dict)  # job -> why this device cannot train it
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)  # a grant's blob and message stay together

    def beat(self, beat: control_pb2.Heartbeat) -> bool:
        """Take over what a heartbeat says; True if there is more memory free than before."""
        freed = beat.free_bytes > self.free_bytes
        self.busy_seconds = beat.busy_seconds
        self.resident_bytes, self.free_bytes = beat.resident_bytes, beat.free_bytes
        return freed

    def offer(self, held: Sequence[str], demands: Mapping[str, Demand]) -> Offer:
        """For placement: what the device holds, and what its memory has room for once that is there."""
        jobs = {job_id: demands[job_id] for job_id in held if job_id in demands}
        placed = sum(demand.memory_bytes for demand in jobs.values())
        return Offer(
            device_id=self.hello.device_id,
            order=self.order,
            speed=self.hello.numbers_per_second,
            memory_bytes=self.free_bytes - max(0, placed - self.resident_bytes),
            jobs=jobs,
        )
