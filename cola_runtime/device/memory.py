"""What a device says when its process gets no more memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cola_runtime.errors import Unavailable
from cola_runtime.machine import is_memory_refused

OUT_OF_MEMORY = "DEVICE_OUT_OF_MEMORY"


@contextmanager
def shortage_named(what: str) -> Iterator[None]:
    """Raises Unavailable `DEVICE_OUT_OF_MEMORY` where memory for `what` is refused."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory_refused(error):
            raise
        raise Unavailable(
            "DEVICE_OUT_OF_MEMORY", f"the device's process gets no memory for {what}"
        ) from error
