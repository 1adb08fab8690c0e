"""A device's end of an adapter's update chain: the link that it states of each version it sends."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future

from cola_runtime.types import Lease
from cola_runtime.update_chain import START, content_digest, next_link


class SentChain:
    """One lease's chain. Hashes on `hashing`, which must do its work in the order it got it."""

    def __init__(self, lease: Lease, hashing: Executor, *, link: bytes) -> None:
        self._lease, self._hashing = lease, hashing
        self.link: Future[bytes] = Future()
        self.link.set_result(link or START)

    def extend(self, version: int, weights: Sequence[memoryview]) -> None:
        """The next version's link becomes `link`; the weights' bytes must not change until it is made."""
        before = self.link

        def made() -> bytes:
            content = content_digest(weights)
            lease = self._lease
            return next_link(
                lease.job_id, epoch=lease.epoch, version=version, previous=before.result(), content=content
            )

        self.link = self._hashing.submit(made)
