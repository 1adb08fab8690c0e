"""`cola bench trace`: K tenants train and export on a real service of this machine while a trace is recorded.

Ray, gRPC, two devices and the SDK, each tenant with a key of its own; the rows are real chat messages. Every
checkpoint is exported as soon as it is there, while the others go on training.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.config import ServiceSettings, service_settings
from cola_runtime.demo.datasets import chat_messages_by_sender
from cola_runtime.job_choices import Task
from cola_runtime.runtime.coordinator import RunningService, running_service
from cola_runtime.spec import JobSpec
from cola_runtime.trace.report import TraceReport, read_trace
from cola_runtime.trace.spans import SpanRecorder

SMALL_MODEL = "minilm-l6-v2"
JOB_TIMEOUT_SECONDS = 3600.0
CHECKPOINTS = 3  # of a job, each exported
TEXT_CHARACTERS = 120  # of a row
MEASURED_SPANS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRun:
    """What to run: all tenants alike, but for their text."""

    base_model: str = SMALL_MODEL
    dtype: str = "float32"
    tenants: int = 8
    steps: int = 12
    rows_per_step: int = 4
    threads: int = 1
    token_budget: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    report: TraceReport
    trace: bytes
    span_microseconds: float  # what recording one span costs
    recording_share: float  # of the time, by that and by the spans of the process that has the most


def traced_run(run: TracedRun) -> Traced:
    """Raises JobFailed when a job does not succeed."""
    trace = asyncio.run(_record(run))
    content: dict[str, Any] = json.loads(trace)
    report = read_trace(content)
    cost = span_seconds()
    most_spans = max(content["otherData"]["spans"].values())
    return Traced(
        report=report,
        trace=trace,
        span_microseconds=1e6 * cost,
        recording_share=cost * most_spans / content["otherData"]["seconds"],
    )


def span_seconds() -> float:
    """What it costs to record a span with three details."""
    spans = SpanRecorder()
    spans.switch(True, now=0.0)
    rounds = []
    for _ in range(5):
        started = time.perf_counter()
        for number in range(MEASURED_SPANS):
            spans.add("lane", "name", begin=0.0, end=time.monotonic(), job="job", version=number, bytes=1)
        rounds.append((time.perf_counter() - started) / MEASURED_SPANS)
    return statistics.median(rounds)


async def _record(run: TracedRun) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(run, Path(folder))
        async with running_service(settings) as service, AsyncExitStack() as stack:
            operator = await stack.enter_async_context(await _client(service, "operator"))
            clients = [
                await stack.enter_async_context(await _client(service, f"tenant-{number}"))
                for number in range(run.tenants)
            ]
            spec = _spec(run, service.base_model.tasks)
            labelled = Task.CAUSAL_LM not in service.base_model.tasks
            datasets = await asyncio.to_thread(_datasets, run, labelled=labelled)
            await operator.start_trace()
            training = (
                _train(client, spec, dataset, Path(folder) / f"adapters-{number}")
                for number, (client, dataset) in enumerate(zip(clients, datasets, strict=True))
            )
            await asyncio.gather(*training)
            return await operator.stop_trace()


def _settings(run: TracedRun, folder: Path) -> ServiceSettings:
    return service_settings(
        data_dir=folder / "service",
        listen="127.0.0.1:0",
        base_models=[{"name": run.base_model, "dtype": run.dtype, "threads": run.threads}],
        devices={"count": 2},
        scheduler={"token_budget": run.token_budget},
    )


async def _client(service: RunningService, tenant: str) -> AsyncClient:
    await service.store.create_tenant(tenant)
    key = await service.store.create_key(tenant)
    return AsyncClient(base_url=f"grpc://{service.endpoint}", api_key=key)


async def _train(client: AsyncClient, spec: JobSpec, training: bytes, folder: Path) -> None:
    handle = await client.submit(spec, training=training)
    exporting = asyncio.create_task(_export_each(handle, folder))
    try:
        await handle.wait(JOB_TIMEOUT_SECONDS)
        await exporting
    finally:
        exporting.cancel()


async def _export_each(handle: AsyncJobHandle, folder: Path) -> None:
    """Every checkpoint behind the first step, as soon as it is there."""
    async for event in handle.events():
        if event.kind == "checkpoint.made" and event.data["version"]:
            version = event.data["version"]
            await handle.download_adapter(folder / str(version), version=version)


def _spec(run: TracedRun, tasks: Sequence[Task]) -> JobSpec:
    fields: dict[str, Any] = {
        "name": "traced",
        "base_model": run.base_model,
        "steps": run.steps,
        "rows_per_step": run.rows_per_step,
        "adapter": {"rank": 8, "alpha": 16, "target_modules": "all-linear"},
        "checkpoint_every": max(1, run.steps // CHECKPOINTS),
    }
    if Task.CAUSAL_LM not in tasks:
        fields["task"] = {"kind": "sequence_classification", "labels": 2}
    return JobSpec.model_validate(fields)


def _datasets(run: TracedRun, *, labelled: bool) -> list[bytes]:
    """Of each tenant some messages of one sender; where there are labels: whether longer than usual."""
    senders = sorted(chat_messages_by_sender().values(), key=lambda texts: -sum(map(len, texts)))
    rows = run.rows_per_step * run.steps
    return [_rows(texts, rows, labelled=labelled) for texts in senders[: run.tenants]]


def _rows(messages: Sequence[str], count: int, *, labelled: bool) -> bytes:
    texts, text = [], ""
    for message in messages:
        text = f"{text} {message}".strip()
        if len(text) >= TEXT_CHARACTERS:
            texts.append(text)
            text = ""
        if len(texts) == count:
            break
    usual = statistics.median(map(len, texts))
    records = [{"text": t} | ({"label": int(len(t) > usual)} if labelled else {}) for t in texts]
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)
