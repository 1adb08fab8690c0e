"""A microbatch's taps on their way to one device, as a span: from its first tensor to its end."""

from __future__ import annotations

import time

from cola_runtime.proto import control_pb2
from cola_runtime.trace.spans import SpanRecorder
from cola_runtime.transport.frames import TensorAddress


class SentTaps:
    """Told of what one device link sends, in order. Belongs to the event loop."""

    def __init__(self, spans: SpanRecorder, device_id: str) -> None:
        self._spans = spans
        self._lane = f"to {device_id}"
        self._begun: dict[str, tuple[float, int]] = {}  # job -> when its taps began to leave, bytes so far

    def tensor(self, address: TensorAddress, wire_bytes: int) -> None:
        if not self._spans.on:
            self._begun.clear()
            return
        begin, sent = self._begun.get(address.job_id) or (time.monotonic(), 0)
        self._begun[address.job_id] = begin, sent + wire_bytes

    def control(self, message: control_pb2.GradientControl) -> None:
        if not self._spans.on or not message.HasField("microbatch_end"):
            return
        end, now = message.microbatch_end, time.monotonic()
        begin, sent = self._begun.pop(end.lease.job_id, (now, 0))
        self._spans.add(
            self._lane,
            "taps",
            begin=begin,
            end=now,
            job=end.lease.job_id,
            version=end.version,
            microbatch=end.microbatch,
            bytes=sent,
        )
