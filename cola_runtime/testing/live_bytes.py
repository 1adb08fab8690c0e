"""Counts the bytes of tensors that come to be while a computation runs, and how many live at once.

Counted, not measured: what the allocator keeps for later does not show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within the context every operation's new storages are followed until they are freed.

    `now` and `peak` are bytes; storages from outside the context (weights, inputs) do not count.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._followed: dict[int, tuple[StorageWeakRef, int]] = {}
        self._foreign: dict[int, StorageWeakRef] = {}

    @property
    def now(self) -> int:
        self._followed = {key: each for key, each in self._followed.items() if _is_alive(each[0])}
        return sum(nbytes for _, nbytes in self._followed.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._followed:
                self._foreign.setdefault(storage._cdata, _weakly(storage))
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self._foreign:
                self._followed[storage._cdata] = (_weakly(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result


def _storages(values: Any) -> Iterator[Any]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()


def _weakly(storage: Any) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _is_alive(reference: StorageWeakRef) -> bool:
    return not reference.expired()  # type: ignore[no-untyped-call]
