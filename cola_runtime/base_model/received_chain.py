"""The base model's end of an adapter's update chain: what it has received, and whether that fits together."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cola_runtime.errors import Conflict
from cola_runtime.update_chain import START, RecordedLink, content_digest, next_link

MOST_REMEMBERED = 10_000  # contents of earlier versions, 32 bytes each


class ReceivedChain:
    """One lease's chain of one shard. Any one thread at a time, update by update in their order."""

    def __init__(self, job_id: str, epoch: int, *, origin: RecordedLink | None) -> None:
        self._job_id, self._epoch = job_id, epoch
        self._origin = origin
        self._version: int | None = None
        self._head = START if origin is None else origin.digest
        self._content = b""
        self._earlier: deque[bytes] = deque(maxlen=MOST_REMEMBERED)

    def follow(self, version: int, weights_P: Tensor, *, stated: bytes) -> bytes:
        """The link of the version that a device has sent, which must be the one that the device `stated`.

        The lease's first version must be the recorded one; the same version again (after a lost stream) must
        be the same. Raises Conflict `UPDATE_NOT_RECORDED`, `UPDATE_REPLACED`, `UPDATE_ROLLED_BACK`,
        `UPDATE_CHAIN_BROKEN`.
        """
        weights = [bytes_of(weights_P)]
        content = content_digest(weights)
        if self._version is None:
            self._begin(version, weights)
        elif version == self._version:
            if content != self._content:
                message = f"version {version} came again with other weights"
                raise Conflict("UPDATE_REPLACED", message, where=self._job_id)
        else:
            self._extend(version, content)
        if stated != self._head:
            raise Conflict(
                "UPDATE_CHAIN_BROKEN",
                f"version {version} does not follow from the versions that came before it",
                where=self._job_id,
                limit=self._head.hex(),
                actual=stated.hex(),
            )
        self._version, self._content = version, content
        return self._head

    def _begin(self, version: int, weights: Sequence[memoryview]) -> None:
        origin = self._origin
        if origin is not None and (origin.version != version or not origin.holds(weights)):
            raise Conflict(
                "UPDATE_NOT_RECORDED",
                f"the lease begins with version {version}, whose weights are not those of the record",
                where=self._job_id,
                limit=f"version {origin.version}",
            )

    def _extend(self, version: int, content: bytes) -> None:
        """A step may leave the weights as they are (a learning rate of 0), not lead back to older ones."""
        if content != self._content and content in self._earlier:
            message = f"version {version} has the weights of an earlier version"
            raise Conflict("UPDATE_ROLLED_BACK", message, where=self._job_id)
        if content != self._content:
            self._earlier.append(self._content)
        self._head = next_link(
            self._job_id, epoch=self._epoch, version=version, previous=self._head, content=content
        )


def chains_of(
    job_id: str, epoch: int, origins: Sequence[RecordedLink], *, shards: int
) -> list[ReceivedChain]:
    """By shard; an adapter that begins from its seed has no origins."""
    from_record: Sequence[RecordedLink | None] = origins or [None] * shards
    return [ReceivedChain(job_id, epoch, origin=origin) for origin in from_record]


def bytes_of(vector_P: Tensor) -> memoryview:
    """A vector's own memory."""
    array: Any = vector_P.detach().numpy()
    return memoryview(array).cast("B")
