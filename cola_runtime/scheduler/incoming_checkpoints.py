"""The checkpoints that a device hands on over its control stream: each one's bytes, then what they are."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from dataclasses import dataclass

from cola_runtime.errors import ProtocolError
from cola_runtime.proto import control_pb2
from cola_runtime.scheduler.leases import LeaseBook
from cola_runtime.transport.control import lease_from_proto
from cola_runtime.transport.reader import FrameLimits, ReceivedTensor
from cola_runtime.types import Lease, TensorKind

logger = logging.getLogger(__name__)

CHECKPOINT_LIMITS = FrameLimits(max_tensor_bytes=4 << 30, max_open_tensors=2, max_open_bytes=4 << 30)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivedCheckpoint:
    """Whole, and under a lease that its device holds."""

    lease: Lease  # the device's part of it
    version: int
    content: memoryview
    sha256: str  # hex


class IncomingCheckpoints:
    """Of one stream of one device."""

    def __init__(self, device_id: str, book: LeaseBook) -> None:
        self._device_id, self._book = device_id, book
        self._blobs: dict[tuple[str, int], ReceivedTensor] = {}  # by job and epoch

    def keep(self, item: ReceivedTensor) -> None:
        """The bytes of one. Raises ProtocolError `TENSOR_INVALID` for any other tensor."""
        address = item.address
        if address.kind is not TensorKind.BLOB:
            raise ProtocolError("TENSOR_INVALID", f"a control stream carries no {address.kind.name}")
        part = Lease(job_id=address.job_id, epoch=address.epoch, device_id=self._device_id)
        if self._book.holds(self._device_id, part):  # no other, so that a device fills no memory with them
            self._blobs[address.job_id, address.epoch] = item

    async def take(self, made: control_pb2.CheckpointMade) -> ArrivedCheckpoint | None:
        """The checkpoint that the message completes; None under a lease that the device does not hold.

        Raises ProtocolError `CHECKPOINT_INCOMPLETE`, `CHECKPOINT_CORRUPT`.
        """
        blob = self._blobs.pop((made.lease.job_id, made.lease.epoch), None)
        lease = lease_from_proto(made.lease)
        if not self._book.holds(self._device_id, lease):
            logger.info("checkpoint of an older lease ignored", extra={"event": "checkpoint.fenced"})
            return None
        if blob is None or len(blob.data) != made.bytes:
            raise ProtocolError(
                "CHECKPOINT_INCOMPLETE",
                "a checkpoint's bytes must come before its message",
                limit=made.bytes,
                actual=len(blob.data) if blob else 0,
            )
        digest = await asyncio.to_thread(lambda: hashlib.sha256(blob.data).hexdigest())
        if digest != made.sha256:
            raise ProtocolError("CHECKPOINT_CORRUPT", "a checkpoint's sha256 does not match its bytes")
        return ArrivedCheckpoint(lease=lease, version=made.version, content=blob.data, sha256=digest)
