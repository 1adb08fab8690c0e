"""Asks the devices for what they recorded, and learns from the answer how their clocks stand."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cola_runtime.proto import control_pb2
from cola_runtime.trace.spans import ClockExchange, ProcessSpans
from cola_runtime.transport.span_messages import SpanAnswer

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0

Send = Callable[[control_pb2.DeviceControl], Awaitable[Any]]
Answered = tuple[ClockExchange, ProcessSpans]


@dataclass(slots=True)
class _Question:
    asked: float
    answer: SpanAnswer = field(default_factory=SpanAnswer)
    first: float = 0.0  # when its first message came; 0 before
    done: asyncio.Future[Answered] = field(default_factory=asyncio.Future)


class DeviceSpans:
    """One question to a device at a time; a device that does not answer is left out."""

    def __init__(self) -> None:
        self._questions: dict[str, _Question] = {}

    async def ask(self, devices: Mapping[str, Send], *, on: bool) -> dict[str, Answered]:
        """Tell these devices to record or not; what each answered within ANSWER_SECONDS."""
        asking = {device_id: self._ask(device_id, send, on) for device_id, send in devices.items()}
        answers = await asyncio.gather(*asking.values())
        return {name: answer for name, answer in zip(asking, answers, strict=True) if answer is not None}

    def heard(self, device_id: str, message: control_pb2.RecordedSpans) -> None:
        """Raises ProtocolError `SPANS_INVALID`; an answer that nobody waits for is dropped."""
        question = self._questions.get(device_id)
        if question is None or question.done.done():
            return
        question.first = question.first or time.monotonic()
        recorded = question.answer.add(message)
        if recorded is not None:
            clock = ClockExchange(asked=question.asked, answered=question.first, theirs=recorded.now)
            question.done.set_result((clock, recorded))

    async def _ask(self, device_id: str, send: Send, on: bool) -> Answered | None:
        question = self._questions[device_id] = _Question(asked=time.monotonic())
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                message = control_pb2.RecordSpans(on=on)
                await send(control_pb2.DeviceControl(record_spans=message))
                return await question.done
        except Exception as error:
            logger.warning("no spans of %s: %r", device_id, error, extra={"event": "trace.device_missing"})
            return None
        finally:
            del self._questions[device_id]
