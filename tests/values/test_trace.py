"""Spans, clocks and what is read off a trace."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cola_runtime.errors import InvalidInput, ProtocolError
from cola_runtime.proto import control_pb2
from cola_runtime.trace.chrome import (
    BASE_MODEL,
    COORDINATOR,
    DEVICE,
    TracedProcess,
    chrome_trace,
    trace_bytes,
)
from cola_runtime.trace.report import BASE_STEP, EXPORT, QUEUED, WORKER, TraceReport, read_trace
from cola_runtime.trace.spans import ClockExchange, ProcessSpans, Span, SpanRecorder, best_exchange
from cola_runtime.transport.span_messages import SPANS_A_MESSAGE, SpanAnswer, recorded_spans


def process(role: str, *spans: tuple[str, str, float, float], offset: float = 0.0) -> TracedProcess:
    listed = tuple(Span(*span, {}) for span in spans)
    recorded = ProcessSpans(now=0.0, spans=listed, recorded=len(listed))
    return TracedProcess(name=role, role=role, recorded=recorded, offset=offset)


def base(*steps: tuple[float, float], other: tuple[tuple[str, float, float], ...] = ()) -> TracedProcess:
    spans = [("compute thread", BASE_STEP, *step) for step in steps]
    return process(BASE_MODEL, *spans, *(("compute thread", *each) for each in other))


def report(*processes: TracedProcess) -> TraceReport:
    trace = chrome_trace(processes, began=0.0, ended=100.0)
    return read_trace(json.loads(trace_bytes(trace)))


def test_nothing_is_recorded_while_recording_is_off() -> None:
    spans = SpanRecorder()
    spans.add("lane", "before", begin=0, end=1)
    spans.switch(True, now=0.0)
    spans.add("lane", "while", begin=1, end=2)
    recorded = spans.switch(False, now=3.0)
    spans.add("lane", "after", begin=2, end=3)
    assert [span.name for span in recorded.spans] == ["while"]
    assert recorded.now == 3.0
    spans.switch(True, now=4.0)
    assert spans.switch(False, now=5.0).spans == ()


def test_the_newest_spans_are_kept_and_the_forgotten_ones_are_counted() -> None:
    spans = SpanRecorder(capacity=3)
    spans.switch(True, now=0.0)
    for number in range(5):
        spans.add("lane", str(number), begin=0, end=1)
    recorded = spans.switch(False, now=0.0)
    assert [span.name for span in recorded.spans] == ["2", "3", "4"]
    assert recorded.recorded == 5


def test_the_shortest_exchange_tells_how_a_clock_stands_and_how_wrong_that_may_be() -> None:
    exchanges = [
        ClockExchange(asked=10.0, answered=14.0, theirs=111.0),
        ClockExchange(asked=20.0, answered=20.2, theirs=120.05),
    ]
    best = best_exchange(exchanges)
    assert best.offset == pytest.approx(-99.95)
    assert best.error == pytest.approx(0.1)


def test_events_of_all_processes_are_on_one_clock_from_the_beginning_of_the_recording() -> None:
    processes = [
        process(COORDINATOR, ("exports", EXPORT, 10.5, 11.0)),
        process(BASE_MODEL, ("compute thread", BASE_STEP, 110.0, 112.0), offset=-99.0),
    ]
    trace = chrome_trace(processes, began=10.0, ended=20.0)
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(e["name"], e["ts"], e["dur"]) for e in events] == [(EXPORT, 0.5e6, 0.5e6), (BASE_STEP, 1e6, 2e6)]
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert names == {"coordinator", "base model", "exports", "compute thread"}


def test_busy_is_the_share_in_base_steps_from_the_first_to_the_last() -> None:
    found = report(
        base((1.0, 3.0), (4.0, 5.0), other=(("install", 3.2, 3.4),)),
        process(DEVICE, (WORKER, "gradients", 2.0, 3.0), (WORKER, "optimizer step", 2.5, 3.0)),
    )
    assert found.base_busy == pytest.approx(0.75)
    assert found.seconds == pytest.approx(4.0)
    assert found.base_other_work == pytest.approx({"install": 0.05})
    assert found.device_busy == pytest.approx({DEVICE: 0.25})


@pytest.mark.parametrize(
    ("other", "coordinator", "cause"),
    [
        ((("install", 1.0, 1.9),), (), "at install"),
        ((), (("queue of job-1", QUEUED, 0.5, 2.0),), "a microbatch waited"),
        ((), (("job job-1", "its device", 0.9, 2.0),), "its device"),
        ((), (), "no job was there"),
    ],
)
def test_a_gap_has_a_cause(other: Any, coordinator: Any, cause: str) -> None:
    found = report(base((0.0, 1.0), (2.0, 3.0), other=other), process(COORDINATOR, *coordinator))
    assert cause in found.longest_gaps[0].cause


def test_a_gap_during_an_export_that_is_longer_than_all_others_counts_as_a_delayed_step() -> None:
    steps = [(float(n), n + 0.9) for n in range(10)]
    beside = process(COORDINATOR, ("exports", EXPORT, 3.2, 5.5))
    free = report(base(*steps), beside).exports
    assert (free.exports, free.base_steps_meanwhile, free.gaps_meanwhile, free.delayed_steps) == (1, 3, 2, 0)
    assert free.usual_gap_seconds == pytest.approx(0.1)
    steps[4] = (4.05, 4.9)
    held = report(base(*steps), beside).exports
    assert held.delayed_steps == 1
    assert held.longest_gap_meanwhile_seconds == pytest.approx(0.15)


@pytest.mark.parametrize("trace", [{}, {"traceEvents": [{"pid": 1}]}, {"traceEvents": []}, []])
def test_what_is_no_trace_is_refused(trace: Any) -> None:
    with pytest.raises(InvalidInput) as refused:
        read_trace(trace)
    assert refused.value.reason == "TRACE_INVALID"


def test_a_devices_spans_travel_in_messages_of_bounded_size() -> None:
    spans = tuple(
        Span(WORKER, "gradients", n, n + 0.5, {"job": f"job-{n}", "version": n})
        for n in range(SPANS_A_MESSAGE + 1)
    )
    messages = list(recorded_spans(ProcessSpans(now=7.0, spans=spans, recorded=9999)))
    answer = SpanAnswer()
    assert len(messages) == 2
    assert answer.add(messages[0].recorded_spans) is None
    whole = answer.add(messages[1].recorded_spans)
    assert whole == ProcessSpans(now=7.0, spans=spans, recorded=9999)


def test_a_device_that_answers_with_times_that_are_none_is_refused() -> None:
    span = control_pb2.RecordedSpan(lane=WORKER, name="gradients", begin=1.0, end=float("nan"))
    with pytest.raises(ProtocolError) as refused:
        SpanAnswer().add(control_pb2.RecordedSpans(now=1.0, spans=[span], last=True))
    assert refused.value.reason == "SPANS_INVALID"


def test_an_export_is_not_blamed_for_installs_nor_for_what_comes_after_the_last_base_step() -> None:
    steps = [(0.0, 1.0), (1.1, 2.0), (3.0, 4.0)]
    installs = (("install", 2.0, 2.95), ("install", 9.0, 9.1))
    exports = process(
        COORDINATOR, ("exports", EXPORT, 2.5, 2.9), ("exports", EXPORT, 2.96, 3.5), ("exports", EXPORT, 5, 6)
    )
    found = report(base(*steps, other=installs), exports).exports
    assert (found.gaps_meanwhile, found.delayed_steps) == (1, 0)
    assert found.longest_gap_meanwhile_seconds == pytest.approx(0.05)
