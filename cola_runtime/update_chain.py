"""The chain of an adapter's updates: each version tied to what it holds and to every version before it.

    link(v) = sha256(job, epoch, v, link(v - 1), sha256(weights of v))

A device states the link of each update it sends; the base model makes the same chain of what arrives, and the
coordinator records it with the step. So an update that was replayed, put into another's place, or sent in
another order is noticed by its number alone, and a checkpoint is of its job's history or it is not. Nothing
here is a secret: who computes honestly is not shown by a chain (docs/security.md, spot checks).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass

DIGEST_BYTES = 32
START = bytes(DIGEST_BYTES)
"""In place of a link before the first: an adapter's version 0 follows from its seed."""

_PREFIX = b"cola update 1\0"


def content_digest(parts: Iterable[bytes | memoryview]) -> bytes:
    """Of all weights of a version, in catalogue order, as their bytes. Lets other threads run meanwhile."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def next_link(job_id: str, *, epoch: int, version: int, previous: bytes, content: bytes) -> bytes:
    """The link of `version`, applied under the lease of `epoch`, behind the link `previous`."""
    fixed = struct.pack("<32s32sIIH", previous, content, epoch, version, len(job_id))
    return hashlib.sha256(_PREFIX + fixed + job_id.encode()).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedLink:
    """What the record says of one version of one adapter, or of one shard of it."""

    job_id: str
    epoch: int  # of the lease under which the version was made
    version: int
    previous: bytes
    digest: bytes

    def holds(self, content: bytes) -> bool:
        """These weights (`content_digest`) are the ones that were recorded."""
        made = next_link(
            self.job_id, epoch=self.epoch, version=self.version, previous=self.previous, content=content
        )
        return made == self.digest
