"""`cola demo`: a real service on this machine, four tenants through the SDK, then proof of the result.

Order: start the service (Ray, base model, two devices), generate before, submit the four jobs, watch,
generate after, download the adapters, check each in a fresh process with peft, write report and picture.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.live import Live

from cola_runtime.base_model.pretrained import prepare_smollm2
from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.client.values import Job, Service
from cola_runtime.config import ServiceSettings, service_settings
from cola_runtime.demo import SERVICE_FOLDER
from cola_runtime.demo.live import live_table
from cola_runtime.demo.memory import MemoryWatch
from cola_runtime.demo.report import write_report
from cola_runtime.demo.result import DemoReport, ServiceResult, StepPoint, TenantResult
from cola_runtime.demo.tenants import DemoTenant, four_tenants
from cola_runtime.errors import JobFailed
from cola_runtime.machine import machine, versions
from cola_runtime.process_environment import child_environment
from cola_runtime.runtime.coordinator import RunningService, running_service

BASE_MODEL = "smollm2-135m-instruct"
DEFAULT_STEPS = 16
NEW_TOKENS = 24
CHECK_TIMEOUT_SECONDS = 300
REFRESH_SECONDS = 0.5
JOB_TIMEOUT_SECONDS = 1200


@dataclass(slots=True, kw_only=True)
class _Tenant:
    """A tenant while the demo runs."""

    tenant: DemoTenant
    client: AsyncClient
    handle: AsyncJobHandle | None = None
    before: str = ""
    after: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Watched:
    """What watching the four jobs gave."""

    wall_seconds: float
    base_busy: float
    base_steps: int


def run_demo(
    output: Path, *, steps: int = DEFAULT_STEPS, kill_device: bool = False, console: Console | None = None
) -> DemoReport:
    """Run the whole demo into `output`; with `kill_device`, SIGKILL the busiest device in the middle.

    Raises JobFailed when a job does not succeed. The report says which checks passed.
    """
    return asyncio.run(_run(output, steps, kill_device, console or Console()))


async def _run(output: Path, steps: int, kill_device: bool, console: Console) -> DemoReport:
    settings = _settings(output)
    console.print(f"preparing {BASE_MODEL} and the four tenants' text")
    base_folder = await asyncio.to_thread(prepare_smollm2, settings.cache_dir)
    tenants = await asyncio.to_thread(four_tenants, BASE_MODEL, steps=steps)
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    with MemoryWatch() as memory:
        console.print("starting the service: Ray, one base model, two devices")
        async with running_service(settings) as service, AsyncExitStack() as stack:
            running = [await _join(service, tenant, stack) for tenant in tenants]
            console.print(f"coordinator at {service.endpoint}, {service.base_model.details}")
            await _generate_before(running)
            watched = await _train(running, console, kill_device=kill_device)
            results = [await _collect(entry, output) for entry in running]
    console.print("\nchecking each exported folder with peft, in a fresh process")
    checked = await _check(results, base_folder, output)
    report = DemoReport(
        started_at=started_at,
        service=ServiceResult(
            base_model=BASE_MODEL,
            base_busy=watched.base_busy,
            base_steps=watched.base_steps,
            wall_seconds=watched.wall_seconds,
            peak_memory_bytes=memory.peak_bytes,
            machine=_machine_text(),
            versions=versions(),
        ),
        tenants=checked,
    )
    await asyncio.to_thread(write_report, report, output)
    return report


def _settings(output: Path) -> ServiceSettings:
    """A fresh service beside the report; a free port, so that a running service is not in the way."""
    data_dir = output / SERVICE_FOLDER
    shutil.rmtree(data_dir, ignore_errors=True)
    return service_settings(
        data_dir=data_dir, listen="127.0.0.1:0", base_models=[{"threads": min(2, os.cpu_count() or 1)}]
    )


async def _join(service: RunningService, tenant: DemoTenant, stack: AsyncExitStack) -> _Tenant:
    await service.store.create_tenant(tenant.name)
    key = await service.store.create_key(tenant.name)
    client = AsyncClient(base_url=f"grpc://{service.endpoint}", api_key=key)
    return _Tenant(tenant=tenant, client=await stack.enter_async_context(client))


async def _generate_before(running: list[_Tenant]) -> None:
    for entry in running:
        prompt = _prompt(entry.tenant)
        generation = await entry.client.generate(prompt, base_model=BASE_MODEL, max_new_tokens=NEW_TOKENS)
        entry.before = generation.text


async def _train(running: list[_Tenant], console: Console, *, kill_device: bool) -> _Watched:
    for entry in running:
        data = entry.tenant.data
        entry.handle = await entry.client.submit(
            entry.tenant.spec, training=data.training, evaluation=data.held_out
        )
    started = time.monotonic()
    service = await running[0].client.describe()
    busy_before, steps_before = service.base_busy_seconds, service.base_steps
    killed = not kill_device
    with Live(console=console, refresh_per_second=4) as live:
        while True:
            jobs = {entry.tenant.name: await _handle(entry).refresh() for entry in running}
            service = await running[0].client.describe()
            live.update(live_table(jobs, service, started=started, busy_before=busy_before))
            if all(job.ended for job in jobs.values()):
                break
            if time.monotonic() - started > JOB_TIMEOUT_SECONDS:
                raise JobFailed("DEMO_TIMEOUT", f"the jobs did not end within {JOB_TIMEOUT_SECONDS} s")
            if not killed and _halfway(jobs):
                killed = True
                _kill_busiest(service, console)
            await asyncio.sleep(REFRESH_SECONDS)
    wall = time.monotonic() - started
    return _Watched(
        wall_seconds=wall,
        base_busy=min(1.0, (service.base_busy_seconds - busy_before) / wall),
        base_steps=service.base_steps - steps_before,
    )


def _halfway(jobs: Mapping[str, Job]) -> bool:
    return all(2 * job.version >= job.total_steps for job in jobs.values())


def _kill_busiest(service: Service, console: Console) -> None:
    """SIGKILL the device process with the most jobs; this demo started it."""
    device = max(service.devices, key=lambda device: device.jobs)
    console.print(f"SIGKILL to {device.device_id} (process {device.pid}, {device.jobs} jobs)")
    os.kill(device.pid, signal.SIGKILL)


async def _collect(entry: _Tenant, output: Path) -> TenantResult:
    """Everything to show of one tenant. Raises JobFailed unless its job succeeded."""
    handle = _handle(entry)
    job = await handle.wait()
    generation = await handle.generate(_prompt(entry.tenant), max_new_tokens=NEW_TOKENS)
    folder = await handle.download_adapter(output / "adapters" / entry.tenant.name, overwrite=True)
    steps = await handle.metrics()
    data, spec = entry.tenant.data, entry.tenant.spec
    (output / "held-out").mkdir(parents=True, exist_ok=True)
    _held_out_file(output, entry.tenant.name).write_bytes(data.held_out)
    return TenantResult(
        name=entry.tenant.name,
        description=data.description,
        rank=entry.tenant.rank,
        encoding=job.encoding,
        rows_per_step=spec.rows_per_step,
        learning_rate=spec.optimizer.learning_rate,
        steps=tuple(
            StepPoint(step=s.step, loss=s.loss, gradient_norm=s.gradient_norm, learning_rate=s.learning_rate)
            for s in steps
        ),
        training_rows=data.training.count(b"\n"),
        held_out_rows=data.held_out.count(b"\n"),
        loss_before=job.evaluation_loss_before or 0.0,
        loss_after=job.evaluation_loss_after or 0.0,
        prompt=data.prompt.shown,
        generation_before=entry.before,
        generation_after=generation.text,
        bytes_up=job.bytes_up,
        bytes_down=job.bytes_down,
        tokens_per_second=job.tokens / _seconds_between(job.created_at, job.finished_at),
        devices=tuple(dict.fromkeys(s.device_id for s in steps)),
        adapter_folder=str(folder),
    )


async def _check(results: list[TenantResult], base_folder: Path, output: Path) -> tuple[TenantResult, ...]:
    """Held-out losses by stock peft in a fresh process, which knows only the folders and the text."""
    pairs = [f"{result.adapter_folder}={_held_out_file(output, result.name)}" for result in results]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cola_runtime.demo.check", str(base_folder), *pairs),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=child_environment(),
    )
    async with asyncio.timeout(CHECK_TIMEOUT_SECONDS):
        answer, trouble = await process.communicate()
    if process.returncode != 0:
        raise JobFailed("DEMO_CHECK_FAILED", trouble.decode(errors="replace")[-2000:])
    losses: dict[str, float] = json.loads(answer)
    return tuple(replace(result, peft_loss=losses[result.adapter_folder]) for result in results)


def _held_out_file(output: Path, tenant: str) -> Path:
    return output / "held-out" / f"{tenant}.jsonl"


def _prompt(tenant: DemoTenant) -> str | list[dict[str, str]]:
    prompt = tenant.data.prompt
    return list(prompt.messages) if prompt.messages else prompt.text


def _handle(entry: _Tenant) -> AsyncJobHandle:
    assert entry.handle is not None, "submitted before it is watched"
    return entry.handle


def _seconds_between(start: str, end: str) -> float:
    return max(1e-9, (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds())


def _machine_text() -> str:
    found = machine()
    return f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB"
