"""A real service for tests: real gRPC, SQLite, files and tokenizer; only the job runner is a fake."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

from cola_runtime.adapters.checkpoint_format import (
    CheckpointContent,
    TrainingDefinition,
    encode_checkpoint,
)
from cola_runtime.adapters.shapes import weight_shapes
from cola_runtime.jobs.plan import training_plan
from cola_runtime.jobs.records import (
    CheckpointRecord,
    EvaluationRecord,
    JobRecord,
    StepRecord,
    Tenant,
    TenantTerms,
)
from cola_runtime.jobs.state import TERMINAL_STATES, JobState, Trigger
from cola_runtime.jobs.store import JobStore
from cola_runtime.scheduler.device_pool import DeviceStatus
from cola_runtime.scheduler.replicas import ReplicaStatus
from cola_runtime.scheduler.runner import ServiceStatistics
from cola_runtime.server.grpc_server import serve_jobs
from cola_runtime.server.limits import Limits
from cola_runtime.server.service import FineTuningService
from cola_runtime.spec import JobSpec
from cola_runtime.storage.objects import ObjectStorage
from cola_runtime.trace.chrome import BASE_MODEL as BASE_MODEL_ROLE
from cola_runtime.trace.chrome import TracedProcess, chrome_trace, trace_bytes
from cola_runtime.trace.report import BASE_STEP
from cola_runtime.trace.spans import ProcessSpans, Span, SpanRecorder
from cola_runtime.types import BaseModelDescription, Site, SiteKind

BASE_MODEL = "tiny-llama"
CONTEXT_LENGTH = 256
TENANTS = ("alice", "bob")
ROWS = b"".join(b'{"prompt": "Question %d? ", "completion": "Answer %d."}\n' % (n, n) for n in range(20))
TIMEOUT_SECONDS = 20.0


def site_catalogue() -> tuple[Site, ...]:
    """Two layers with the names of a Llama."""
    names = [
        f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")
    ]
    return tuple(
        Site(index=i, name=name, kind=SiteKind.LINEAR, in_features=16, out_features=24, input_group=i)
        for i, name in enumerate(names)
    )


def description(tokenizer_path: Path) -> BaseModelDescription:
    return BaseModelDescription(
        name=BASE_MODEL,
        architecture="LlamaForCausalLM",
        context_length=CONTEXT_LENGTH,
        vocabulary_size=261,
        dtype="float32",
        sites=site_catalogue(),
        gradient_endpoint="127.0.0.1:1",
        tokenizer_path=str(tokenizer_path),
        parameters=12345,
        details={"attention": "sdpa"},
    )


class FakeTrace:
    """Two base steps of a base model, whoever records."""

    async def start(self) -> None:
        pass

    async def stop(self) -> bytes:
        steps = tuple(Span("compute thread", BASE_STEP, n, n + 0.75, {}) for n in range(2))
        recorded = ProcessSpans(now=2.0, spans=steps, recorded=2)
        process = TracedProcess(name=BASE_MODEL_ROLE, role=BASE_MODEL_ROLE, recorded=recorded)
        return trace_bytes(chrome_trace([process], began=0.0, ended=2.0))


class FakeGeneration:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.generated: list[dict[str, Any]] = []

    async def generate(
        self, job_id: str | None, prompt_ids: Sequence[int], **options: Any
    ) -> tuple[list[int], int]:
        """The prompt backwards, so that a test sees that tokens went through."""
        self.generated.append({"job_id": job_id, **options})
        return list(reversed(prompt_ids))[: options["max_new_tokens"]], 3 if job_id else 0


class FakeRunner:
    """Moves jobs between states when asked, and trains nothing by itself."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self.started: list[str] = []
        self.retired: list[str] = []
        self.terms: dict[str, TenantTerms] = {}
        self.spans = SpanRecorder()
        self.trace = FakeTrace()
        self.generation = FakeGeneration()

    async def start(self, job_id: str) -> None:
        self.started.append(job_id)

    async def cancel(self, job_id: str) -> None:
        if (await self._store.job(job_id)).state not in TERMINAL_STATES:
            await self._store.transition(job_id, Trigger.CANCEL)

    async def pause(self, job_id: str) -> None:
        await self._store.transition(job_id, Trigger.PAUSE)

    async def resume(self, job_id: str) -> None:
        await self._store.transition(job_id, Trigger.RESUME)

    async def retire(self, job_id: str) -> None:
        self.retired.append(job_id)

    def set_terms(self, tenant_id: str, terms: TenantTerms) -> None:
        self.terms[tenant_id] = terms

    def waiting_reason(self, job: JobRecord) -> str:
        return "no device is free"

    def replica(self, job: JobRecord) -> str:
        return f"{job.base_model}/0" if job.state is JobState.RUNNING else ""

    def seconds_per_token(self, base_model: str) -> float | None:
        return 0.01

    def devices(self) -> list[DeviceStatus]:
        return [
            DeviceStatus(
                device_id="device-0", state="ready", jobs=1, busy_seconds=1.5, trust_class="trusted", pid=4242
            )
        ]

    def statistics(self) -> ServiceStatistics:
        replica = ReplicaStatus(
            replica=f"{BASE_MODEL}/0",
            base_model=BASE_MODEL,
            state="ready",
            jobs=1,
            base_busy_seconds=30.0,
            base_steps=7,
            tokens=3000,
            bank_hits=3,
            bank_misses=1,
            bank_evicted_bytes=64,
            bank_resident_bytes=128,
        )
        return ServiceStatistics(
            uptime_seconds=60.0, base_busy_seconds=30.0, base_steps=7, replicas=(replica,)
        )


@dataclass
class Served:
    """A running service, and what tests do behind its back."""

    service: FineTuningService
    store: JobStore
    runner: FakeRunner
    objects: Path
    loop: asyncio.AbstractEventLoop
    port: int = 0
    keys: dict[str, str] = field(default_factory=dict)
    tenants: dict[str, Tenant] = field(default_factory=dict)
    server: grpc.aio.Server | None = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"grpc://{self.target}"

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """A coroutine's result, computed on the service's loop."""
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        return future.result(TIMEOUT_SECONDS)

    def stored_files(self) -> list[str]:
        files = (path for path in self.objects.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.objects)) for path in files)

    def nothing_exists(self) -> bool:
        """No job, and therefore no event, and no object."""
        return not self.run(self.store.jobs()) and not self.stored_files() and not self.runner.started

    def train(self, job_id: str, *, steps: int, succeed: bool = False) -> None:
        self.run(self._train(job_id, steps, succeed))

    async def _train(self, job_id: str, steps: int, succeed: bool) -> None:
        job = await self.store.job(job_id)
        if job.state is JobState.QUEUED:
            job = await self.store.transition(job_id, Trigger.START)
        lease = await self.store.grant_lease(job_id, "device-0")
        for step in range(job.version + 1, job.version + steps + 1):
            await self.store.record_step(
                StepRecord(
                    job_id=job_id,
                    epoch=lease.epoch,
                    step=step,
                    loss=4.0 / step,
                    learning_rate=1e-3,
                    gradient_norm=0.5,
                    tokens=100,
                    label_tokens=40,
                    device_id="device-0",
                    bytes_up=2048,
                    bytes_down=1024,
                )
            )
        if succeed:
            await self.store.transition(job_id, Trigger.COMPLETE)

    def evaluate(self, job_id: str, *, loss: float, improved: bool) -> None:
        """Record an evaluation of the job's present version."""

        async def record() -> None:
            job = await self.store.job(job_id)
            await self.store.record_evaluation(
                EvaluationRecord(
                    job_id=job_id,
                    step=job.version,
                    epoch=job.epoch,
                    metrics={"loss": loss, "perplexity": 2.0},
                    primary="loss",
                    greater_is_better=False,
                    improved=improved,
                )
            )

        self.run(record())

    def checkpoint(self, job_id: str) -> CheckpointContent:
        """Store a checkpoint of the job's present version, with weights drawn from the version."""
        return self.run(self._checkpoint(job_id))

    async def _checkpoint(self, job_id: str) -> CheckpointContent:
        job = await self.store.job(job_id)
        base = self.service.describe(self.tenants["alice"]).base_models[0]
        plan = training_plan(JobSpec.model_validate_json(job.spec_json), base, total_steps=job.total_steps)
        definition = TrainingDefinition(spec=plan.adapter, optimizer=plan.optimizer, schedule=plan.schedule)
        draw = np.random.default_rng(job.version)
        weights = {
            key: draw.standard_normal(shape).astype(np.float32)
            for key, shape in weight_shapes(plan.adapter).items()
        }
        adamw = {
            key: {"exp_avg": weight, "exp_avg_sq": weight**2, "step": np.float32(job.version)}
            for key, weight in weights.items()
        }
        content = CheckpointContent.of(definition, job.version, weights, adamw)
        encoded = encode_checkpoint(content)
        key = f"checkpoints/{job_id}/{job.version}"
        ObjectStorage(f"file://{self.objects}").put(key, encoded)
        await self.store.checkpoints.record(
            CheckpointRecord(
                job_id=job_id,
                version=job.version,
                epoch=job.epoch,
                storage_key=key,
                bytes=len(encoded),
                sha256=hashlib.sha256(encoded).hexdigest(),
            )
        )
        return content

    async def listen(self) -> None:
        self.server, self.port = await serve_jobs(self.service, f"127.0.0.1:{self.port}")

    async def hang_up(self) -> None:
        assert self.server is not None
        await self.server.stop(None)


@contextmanager
def serving(folder: Path, tokenizer_path: Path, limits: Limits | None = None) -> Iterator[Served]:
    """The service on its own event loop in its own thread, so that blocking clients can be tested."""
    folder.mkdir(parents=True, exist_ok=True)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="test-service", daemon=True)
    thread.start()
    try:
        served = asyncio.run_coroutine_threadsafe(_start(folder, tokenizer_path, limits), loop).result(
            TIMEOUT_SECONDS
        )
        yield served
        served.run(served.hang_up())
        served.run(served.store.close())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(TIMEOUT_SECONDS)
        loop.close()


async def _start(folder: Path, tokenizer_path: Path, limits: Limits | None) -> Served:
    store = await JobStore.open(f"sqlite:///{folder / 'jobs.sqlite'}")
    objects = folder / "objects"
    runner = FakeRunner(store)
    service = FineTuningService(
        store=store,
        storage=ObjectStorage(f"file://{objects}"),
        runner=runner,  # type: ignore[arg-type]
        base_models={BASE_MODEL: description(tokenizer_path)},
        limits=limits,
    )
    served = Served(
        service=service, store=store, runner=runner, objects=objects, loop=asyncio.get_running_loop()
    )
    for name in TENANTS:
        served.tenants[name] = await store.create_tenant(name)
        served.keys[name] = await store.create_key(name)
    served.keys["reader"] = await store.create_key("alice", scopes=["jobs:read"])
    served.keys["writer"] = await store.create_key("alice", scopes=["jobs:write"])
    await served.listen()
    return served
