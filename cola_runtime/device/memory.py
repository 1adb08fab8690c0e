"""What a device says when its process gets no more memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cola_runtime.errors import Unavailable

OUT_OF_MEMORY = "DEVICE_OUT_OF_MEMORY"
_TORCH_SAYS = "DefaultCPUAllocator"  # in a RuntimeError, which has no class of its own


@contextmanager
def shortage_named(what: str) -> Iterator[None]:
    """Raises Unavailable `DEVICE_OUT_OF_MEMORY` where memory for `what` is refused."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and _TORCH_SAYS not in str(error):
            raise
        raise Unavailable(
            "DEVICE_OUT_OF_MEMORY", f"the device's process gets no memory for {what}"
        ) from error
