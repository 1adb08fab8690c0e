"""What a job is doing: a sentence for its tenant, and a span in the trace from one doing to the next."""

from __future__ import annotations

import time

from cola_runtime.trace.spans import SpanRecorder


class JobPhase:
    """Belongs to the job's driver. `text` says what the job does or waits for."""

    def __init__(self, job_id: str, spans: SpanRecorder, *, text: str) -> None:
        self._job_id, self._spans = job_id, spans
        self._name, self._since = "", 0.0
        self.text = text

    def enter(self, name: str, text: str) -> None:
        """`name` is of few words, the same for all of its kind."""
        self.end()
        self._name, self._since, self.text = name, time.monotonic(), text

    @property
    def name(self) -> str:
        return self._name

    def end(self) -> None:
        """The job does nothing more."""
        if self._name:
            lane = f"job {self._job_id}"
            self._spans.add(lane, self._name, begin=self._since, end=time.monotonic(), text=self.text)
        self._name = ""
