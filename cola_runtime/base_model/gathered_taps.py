"""Taps leave layer by layer, and small ones together: a frame's worth at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from cola_runtime.gradients.compression import Compressed, Int8Blocks
from cola_runtime.transport.frames import MAX_PAYLOAD_BYTES
from cola_runtime.types import Segment, TensorKey

Send = Callable[[Segment, Mapping[TensorKey, Compressed]], Counter[int]]


class GatheredTaps:
    """What one segment of a base step has handed out and not sent yet, less than a frame. Not thread-safe."""

    def __init__(self, segment: Segment, send: Send) -> None:
        self._segment, self._send = segment, send
        self._waiting: dict[TensorKey, Compressed] = {}
        self._waiting_bytes = 0
        self.sent: Counter[int] = Counter()  # tensors by site

    def add(self, tensors: Mapping[TensorKey, Compressed]) -> None:
        """Tensors of a later tap wait for those of earlier ones; a key that waits already goes first."""
        if tensors.keys() & self._waiting.keys():
            self.flush()
        added = sum(map(_data_bytes, tensors.values()))
        if self._waiting_bytes + added > MAX_PAYLOAD_BYTES:
            self.flush()
        self._waiting.update(tensors)
        self._waiting_bytes += added

    def flush(self) -> None:
        """Send what waits."""
        if self._waiting:
            self.sent += self._send(self._segment, self._waiting)
        self._waiting, self._waiting_bytes = {}, 0


def _data_bytes(tensor: Compressed) -> int:
    return (tensor.payload if isinstance(tensor, Int8Blocks) else tensor).nbytes
