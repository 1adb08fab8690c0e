"""Records what the whole service does: coordinator, base model and devices, on the coordinator's clock.

The clocks of the other processes are asked for whenever recording is switched: the answer's time is taken to
be the middle of the exchange, the shortest exchange counts, and half of it is how wrong it can be; the trace
says how much that is (`otherData.clock_errors_ms`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from cola_runtime.errors import Conflict, Unavailable
from cola_runtime.scheduler.device_pool import DevicePool
from cola_runtime.scheduler.device_spans import Answered
from cola_runtime.scheduler.ports import BaseModelPort
from cola_runtime.trace.chrome import (
    BASE_MODEL,
    COORDINATOR,
    DEVICE,
    TracedProcess,
    chrome_trace,
    trace_bytes,
)
from cola_runtime.trace.spans import ClockExchange, SpanRecorder, best_exchange

logger = logging.getLogger(__name__)

EXCHANGES = 3  # of clocks, when recording starts


class TraceDesk:
    """Starts and stops recording. One recording at a time, whoever asks."""

    def __init__(
        self, spans: SpanRecorder, *, bases: Callable[[], Mapping[str, BaseModelPort]], pool: DevicePool
    ) -> None:
        """`bases`: the base models' replicas that answer now, by name."""
        self._spans, self._bases, self._pool = spans, bases, pool
        self._exchanges: dict[str, list[ClockExchange]] = {}
        self._began: float | None = None
        self._switching = asyncio.Lock()

    @property
    def recording(self) -> bool:
        return self._began is not None

    async def start(self) -> None:
        """Record from now on, the newest spans of every process. Raises Conflict `TRACE_RECORDING`."""
        async with self._switching:
            if self._began is not None:
                raise Conflict(
                    "TRACE_RECORDING", "a trace is being recorded already", remedy="Stop that one first."
                )
            self._exchanges = {}
            for _ in range(EXCHANGES):
                await self._switch(True)
            self._began = time.monotonic()
            self._spans.switch(True, now=self._began)

    async def stop(self) -> bytes:
        """The trace as a JSON file. Raises Conflict `TRACE_NOT_RECORDING`."""
        async with self._switching:
            if self._began is None:
                raise Conflict("TRACE_NOT_RECORDING", "no trace is being recorded", remedy="Start one first.")
            began, self._began = self._began, None
            own = self._spans.switch(False, now=time.monotonic())
            answers = await self._switch(False)
            processes = [
                TracedProcess(name=COORDINATOR, role=COORDINATOR, recorded=own),
                *(self._traced(name, answer) for name, answer in sorted(answers.items())),
            ]
            trace = chrome_trace(processes, began=began, ended=own.now)
            return await asyncio.to_thread(trace_bytes, trace)

    async def _switch(self, on: bool) -> dict[str, Answered]:
        answers = {}
        for replica, base in self._bases().items():
            asked = time.monotonic()
            try:
                recorded = await base.record_spans(on)
            except Unavailable as error:
                logger.warning("no spans of %s: %s", replica, error, extra={"event": "trace.replica_lost"})
                continue
            clock = ClockExchange(asked=asked, answered=time.monotonic(), theirs=recorded.now)
            answers[f"{BASE_MODEL} {replica}"] = (clock, recorded)
        answers |= await self._pool.record_spans(on)
        for name, (exchange, _) in answers.items():
            self._exchanges.setdefault(name, []).append(exchange)
        return answers

    def _traced(self, name: str, answer: Answered) -> TracedProcess:
        clock = best_exchange(self._exchanges[name])
        role = BASE_MODEL if name.startswith(f"{BASE_MODEL} ") else DEVICE
        return TracedProcess(name=name, role=role, recorded=answer[1], offset=clock.offset, error=clock.error)
