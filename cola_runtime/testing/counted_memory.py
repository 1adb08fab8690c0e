"""What one more tenant costs the process of the base model in bytes, counted over the tensors that live.

Every storage that a living tensor refers to is counted once. So a bank, a cache, a workspace that grew or a
forgotten copy all show; allocators' reserves do not. The resident set is read beside it, as a check.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import psutil
from numpy.typing import NDArray
from torch import Tensor

from cola_runtime.adapter_spec import AdapterKind
from cola_runtime.testing.base_step_sides import Ours, Peft, tokens_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantBytes:
    """Of one added tenant."""

    weights: int  # of the adapter, in the base model's dtype
    counted: float
    resident: float  # by the operating system's books
    bank_device: float  # what the bank itself reports, on the model's device
    bank_host: float


def living_bytes() -> int:
    """Of all tensors of this process that Python can reach."""
    gc.collect()
    return storage_bytes(each for each in gc.get_objects() if issubclass(type(each), Tensor))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the tensors' storages, each counted once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def added_tenant(
    ours: Ours, rows_BT: NDArray[np.int32], *, kind: AdapterKind, tenants: int, merged: bool = False
) -> TenantBytes:
    """(bytes with `tenants` - bytes with one) / (tenants - 1), each after a base step of the same rows.

    The rows stay the same so that only tenants are added: activations belong to rows. `ours` is a new one, so
    that no buffer has grown for others.
    """

    def measured(count: int) -> NDArray[np.float64]:
        ours.add_team("counted", rows_BT, tenants=count, kinds=(kind,), merged=merged)
        ours.step("counted")
        bank = ours.model.bank_bytes
        found = np.array([living_bytes(), _resident_bytes(), bank.model_device, bank.host], float)
        ours.remove_team("counted")
        return found

    measured(1)  # the rows' own buffers are there from now on
    alone = measured(1)
    counted, resident, device, host = (measured(tenants) - alone) / (tenants - 1)
    return TenantBytes(
        weights=ours.adapter_bytes(kind),
        counted=float(counted),
        resident=float(resident),
        bank_device=float(device),
        bank_host=float(host),
    )


def peft_tenant(peft: Peft, rows_BT: NDArray[np.int32]) -> dict[str, int]:
    """Of one tenant after one real AdamW step: parameters, gradients, exp_avg, exp_avg_sq."""
    parameters, optimizer = peft.train(0, tokens_of(rows_BT))
    states = [optimizer.state[parameter] for parameter in parameters]
    parts: dict[str, Callable[[], Iterable[Tensor]]] = {
        "parameters": lambda: parameters,
        "gradients": lambda: [p.grad for p in parameters if p.grad is not None],
        "exp_avg": lambda: [state["exp_avg"] for state in states],
        "exp_avg_sq": lambda: [state["exp_avg_sq"] for state in states],
    }
    counted = {name: storage_bytes(tensors()) for name, tensors in parts.items()}
    return {**counted, "all": sum(counted.values())}


def _resident_bytes() -> int:
    """After the allocator gave back what it keeps for later, where it is glibc's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(psutil.Process().memory_info().rss)
