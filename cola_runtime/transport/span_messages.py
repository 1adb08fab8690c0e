"""A device's recorded spans as control messages. What a device says is checked: it may be anybody's."""

from __future__ import annotations

import math
from collections.abc import Iterator

from cola_runtime.errors import ProtocolError
from cola_runtime.proto import control_pb2
from cola_runtime.trace.spans import CAPACITY, MOST_LANES, ProcessSpans, Span

SPANS_A_MESSAGE = 2000  # of at most some 200 bytes, so that a message fits a frame
MOST_CHARACTERS = 100


class SpanAnswer:
    """A device's answer to RecordSpans, as it comes in."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._lanes: set[str] = set()
        self._now = 0.0

    def add(self, message: control_pb2.RecordedSpans) -> ProcessSpans | None:
        """The whole answer with its last message. Raises ProtocolError `SPANS_INVALID`."""
        if not self._spans:
            self._now = message.now
        self._spans += [_span(each) for each in message.spans]
        self._lanes.update(each.lane for each in message.spans)
        times = [self._now, *(moment for span in message.spans for moment in (span.begin, span.end))]
        if len(self._spans) > CAPACITY or len(self._lanes) > MOST_LANES or not all(map(math.isfinite, times)):
            raise ProtocolError("SPANS_INVALID", "too many spans or lanes, or times that are none")
        if not message.last:
            return None
        return ProcessSpans(now=self._now, spans=tuple(self._spans), recorded=message.recorded)


def recorded_spans(recorded: ProcessSpans) -> Iterator[control_pb2.DeviceControl]:
    """What a device answers; at least one message."""
    spans = recorded.spans
    for start in range(0, max(len(spans), 1), SPANS_A_MESSAGE):
        answer = control_pb2.RecordedSpans(
            now=recorded.now,
            spans=map(_message, spans[start : start + SPANS_A_MESSAGE]),
            recorded=recorded.recorded,
            last=start + SPANS_A_MESSAGE >= len(spans),
        )
        yield control_pb2.DeviceControl(recorded_spans=answer)


def _message(span: Span) -> control_pb2.RecordedSpan:
    return control_pb2.RecordedSpan(
        lane=span.lane,
        name=span.name,
        begin=span.begin,
        end=span.end,
        job_id=str(span.details.get("job", "")),
        version=int(span.details.get("version", 0)),
    )


def _span(message: control_pb2.RecordedSpan) -> Span:
    return Span(
        message.lane[:MOST_CHARACTERS],
        message.name[:MOST_CHARACTERS],
        message.begin,
        max(message.begin, message.end),
        {"job": message.job_id[:MOST_CHARACTERS], "version": message.version},
    )
