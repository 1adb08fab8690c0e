"""What the coordinator knows of one device that has dialled in, and tells it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cola_runtime.errors import ProtocolError
from cola_runtime.jobs.plan import TrainingPlan
from cola_runtime.proto import control_pb2
from cola_runtime.scheduler.device_gate import Admission
from cola_runtime.scheduler.placement import Demand, Offer
from cola_runtime.transport.control import lease_grant, lease_to_proto
from cola_runtime.transport.frames import DType, TensorAddress, WireTensor
from cola_runtime.transport.stream import FrameStream
from cola_runtime.types import Lease, TensorKind

UNABLE_REASONS = (
    "ADAPTER_MODULE_UNKNOWN", "ADAPTER_MODULE_INVALID", "ADAPTER_INVALID", "DEVICE_OUT_OF_MEMORY"
)  # fmt: skip
"""A device that refuses a lease so will refuse it again, as long as its process is what it is."""

UNKNOWN_MEMORY_BYTES = 1 << 30
"""What a device is taken to have free until its first heartbeat, which comes at once."""

MOST_NUMBERS_PER_SECOND = 1e15
"""No device is near it; what placement computes with speeds stays finite."""


def check_speed(hello: control_pb2.DeviceHello) -> None:
    """Raises ProtocolError `CONTROL_INVALID` for a speed that no device has."""
    if not 0 <= hello.numbers_per_second <= MOST_NUMBERS_PER_SECOND:
        raise ProtocolError("CONTROL_INVALID", "numbers_per_second of a hello is no speed")


@dataclass(slots=True, kw_only=True)
class ConnectedDevice:
    hello: control_pb2.DeviceHello
    admission: Admission
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
        """Take over what a heartbeat says; True if there is more memory free than before.

        Raises ProtocolError `CONTROL_INVALID` for a time that is none.
        """
        if not 0 <= beat.busy_seconds < math.inf:
            raise ProtocolError("CONTROL_INVALID", "busy_seconds of a heartbeat is no time")
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
            trust=self.admission.trust,
            speed=self.hello.numbers_per_second,
            memory_bytes=self.free_bytes - max(0, placed - self.resident_bytes),
            jobs=jobs,
        )

    async def grant(
        self,
        lease: Lease,
        plan: TrainingPlan,
        *,
        checkpoint: bytes | None,
        gradient_endpoint: str,
        chain: bytes = b"",
    ) -> None:
        """Have it train the plan's adapter, or its shard, from its seed or from a checkpoint.

        Its taps come from `gradient_endpoint`. `chain` is the checkpoint's recorded link.
        """
        message = lease_grant(
            lease,
            plan.adapter,
            optimizer=plan.optimizer,
            schedule=plan.schedule,
            checkpoint_bytes=len(checkpoint or b""),
            checkpoint_every=plan.checkpoint_every,
            gradient_endpoint=gradient_endpoint,
            max_staleness=plan.max_staleness,
            shards=plan.shards,
            chain=chain,
        )
        async with self.sending:
            if checkpoint is not None:
                address = TensorAddress(
                    job_id=lease.job_id, epoch=lease.epoch, version=0, kind=TensorKind.BLOB
                )
                content = WireTensor(dtype=DType.UINT8, shape=(len(checkpoint),), data=memoryview(checkpoint))
                await self.stream.send_tensor(address, content)
            await self.stream.send_control(message)

    async def end(self, lease: Lease) -> None:
        """Have it forget the adapter."""
        ending = control_pb2.LeaseEnd(lease=lease_to_proto(lease))
        await self.stream.send_control(control_pb2.DeviceControl(lease_end=ending))

    async def request_checkpoint(self, lease: Lease) -> None:
        request = control_pb2.CheckpointRequest(lease=lease_to_proto(lease))
        await self.stream.send_control(control_pb2.DeviceControl(checkpoint_request=request))
