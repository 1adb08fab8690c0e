"""Which adapters' weights are on the model's device, where a byte limit leaves no room for all of them.

Every leased adapter's weights are kept in host memory, as the bank computes with them; those that a base
step needs are placed on the model's device, and the longest unused ones leave it. A copy has the bits of what
it is a copy of, so a limit changes no number. What the next step needs is placed beside the running one.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from cola_runtime.base_model.accelerator import Accelerator, PlacedAside
from cola_runtime.types import BankUse


class Version(NamedTuple):
    """One version of one adapter; weights of the same one are the same."""

    job_id: str
    epoch: int
    version: int


class Residency:
    """The placed copies, the longest unused first. `fetch` belongs to the compute thread, the rest to any."""

    def __init__(self, limit_bytes: int, accelerator: Accelerator) -> None:
        self._limit_bytes = limit_bytes
        self._accelerator = accelerator
        self._placed: OrderedDict[Version, PlacedAside] = OrderedDict()
        self._expected: Counter[Version] = Counter()  # by base steps that have been handed over
        self._bytes = 0
        self._hits = self._misses = self._prefetched = self._evicted_bytes = 0
        self._lock = threading.Lock()

    @property
    def use(self) -> BankUse:
        return BankUse(
            hits=self._hits,
            misses=self._misses,
            prefetched=self._prefetched,
            evicted_bytes=self._evicted_bytes,
            resident_bytes=self._bytes,
        )

    def expect(self, wanted: Mapping[Version, Tensor]) -> None:
        """A base step with these weights is to come: place what has room beside all that is expected."""
        with self._lock:
            self._expected.update(wanted.keys())
        for version, weights in wanted.items():
            with self._lock:
                if version not in self._placed and self._make_room(weights.nbytes, keep=self._expected):
                    self._place(version, self._accelerator.placed_aside(_copied(weights, self._accelerator)))
                    self._prefetched += 1

    def unexpect(self, wanted: Mapping[Version, Tensor]) -> None:
        """That step is over."""
        with self._lock:
            self._expected.subtract(wanted.keys())
            self._expected += Counter()  # those that nothing expects any more leave

    def fetch(self, wanted: Mapping[Version, Tensor]) -> dict[Version, Tensor]:
        """The weights on the model's device, for the step that is computed next.

        Room is made at the expense of what no step expects, then of what later steps do. A step whose own
        weights are above the limit goes above it until the next one.
        """
        found = {}
        for version, weights in wanted.items():
            with self._lock:
                if version in self._placed:
                    self._hits += 1
                    self._placed.move_to_end(version)
                else:
                    self._misses += 1
                    if not self._make_room(weights.nbytes, keep={**self._expected, **wanted}):
                        self._make_room(weights.nbytes, keep=wanted)
                    copy = _copied(weights, self._accelerator)
                    self._place(version, PlacedAside(self._accelerator.placed(copy)))
                found[version] = self._placed[version].arrived()
        return found

    def offer(self, version: Version, weights: Tensor) -> None:
        """Place new weights, if nothing has to leave for them."""
        with self._lock:
            if self._bytes + weights.nbytes <= self._limit_bytes:
                self._place(version, self._accelerator.placed_aside(_copied(weights, self._accelerator)))

    def forget(self, version: Version) -> None:
        """The weights are no longer the bank's."""
        with self._lock:
            self._drop(version)

    def _place(self, version: Version, placed: PlacedAside) -> None:
        self._placed[version] = placed
        self._bytes += placed.tensor.nbytes

    def _drop(self, version: Version) -> int:
        placed = self._placed.pop(version, None)
        dropped = 0 if placed is None else placed.tensor.nbytes
        self._bytes -= dropped
        return dropped

    def _make_room(self, needed: int, *, keep: Mapping[Version, object]) -> bool:
        """Evict the longest unused that may go; nothing at all where that would not be enough."""
        going, freed = [], self._limit_bytes - self._bytes
        for version, placed in self._placed.items():
            if freed >= needed:
                break
            if version not in keep:
                going.append(version)
                freed += placed.tensor.nbytes
        if freed < needed:
            return False
        self._evicted_bytes += sum(self._drop(version) for version in going)
        return True


def _copied(weights: Tensor, accelerator: Accelerator) -> Tensor:
    """On a CPU the placed weights are a copy as well, so that evicting them gives memory back there too."""
    return weights if accelerator.is_cuda else weights.clone()
