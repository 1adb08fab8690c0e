"""Jobs from submission to export on a whole service in one process: steering, restarts, generation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.config import ServiceSettings
from cola_runtime.device import worker
from cola_runtime.device.session import AdapterSession
from cola_runtime.errors import InvalidInput, JobFailed
from cola_runtime.jobs.records import JobRecord
from cola_runtime.jobs.store import JobStore
from cola_runtime.proto import control_pb2
from cola_runtime.runtime.coordinator import RunningService
from cola_runtime.spec import OptimizerSpec
from cola_runtime.testing.exactness import (
    MixedJob,
    exported_weights,
    four_tenants,
    largest_difference,
    service_for,
    tenant_client,
    train_reference,
)
from cola_runtime.testing.in_process import InProcessDevices, running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model
from cola_runtime.transport.control import lease_from_proto

STEPS = 30
WAIT_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    service: RunningService
    devices: InProcessDevices
    client: AsyncClient


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings(model: Path, tmp_path: Path) -> ServiceSettings:
    return service_for(tmp_path / "service", model=model, name="tiny", dtype="float32")


@asynccontextmanager
async def running(settings: ServiceSettings, *, key: str | None = None) -> AsyncIterator[Running]:
    async with running_in_process(settings) as (service, devices), AsyncExitStack() as stack:
        client = (
            AsyncClient(base_url=f"grpc://{service.endpoint}", api_key=key)
            if key
            else await tenant_client(service, "alice")
        )
        yield Running(service=service, devices=devices, client=await stack.enter_async_context(client))


def job(number: int = 0, **changes: object) -> MixedJob:
    template = four_tenants("tiny", steps=STEPS, encoding="auto")[number]
    return MixedJob(spec=template.spec.model_copy(update=changes), training=template.training)


async def reach(handle: AsyncJobHandle, version: int) -> None:
    """Return once the job has recorded `version` steps."""
    async with asyncio.timeout(WAIT_SECONDS):
        async for event in handle.events():
            if event.kind == "step.applied" and event.data["step"] >= version:
                return


async def until_state(handle: AsyncJobHandle, state: str) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        async for event in handle.events():
            if event.kind == f"job.{state}":
                return


async def test_a_job_reports_held_out_losses_metrics_and_an_adapter(settings: ServiceSettings) -> None:
    async with running(settings) as at:
        wanted = job(checkpoint_every=10)
        handle = await at.client.submit(wanted.spec, training=wanted.training, evaluation=wanted.training)
        done = await handle.wait(WAIT_SECONDS)
        assert done.evaluation_loss_before is not None
        assert done.evaluation_loss_after is not None
        assert done.evaluation_loss_after < done.evaluation_loss_before
        assert [step.step for step in await handle.metrics()] == list(range(1, STEPS + 1))
        assert [checkpoint.version for checkpoint in await handle.checkpoints()] == [0, 10, 20, 30]
        assert done.bytes_up > 0
        assert done.bytes_down > 0


async def test_a_paused_job_resumes_with_its_optimizer_and_ends_as_if_never_paused(
    settings: ServiceSettings, tmp_path: Path, model: Path
) -> None:
    async with running(settings) as at:
        handle = await at.client.submit(job().spec, training=job().training)
        await reach(handle, 3)
        await handle.pause()
        await until_state(handle, "paused")
        paused = await handle.refresh()
        assert 3 <= paused.version < STEPS
        await handle.resume()
        await handle.wait(WAIT_SECONDS)
        folder = await handle.download_adapter(tmp_path / "adapter")
        alone = train_reference(job(), at.service.base_model, model, attention="sdpa")
        assert largest_difference(exported_weights(folder, at.service.base_model), alone) <= 2e-5


async def test_resuming_at_once_withdraws_the_pause(settings: ServiceSettings) -> None:
    async with running(settings) as at:
        handle = await at.client.submit(job().spec, training=job().training)
        await reach(handle, 2)
        await handle.pause()
        await handle.resume()
        assert (await handle.wait(WAIT_SECONDS)).state == "succeeded"


async def test_a_cancelled_job_keeps_its_checkpoints_and_stays_cancelled(settings: ServiceSettings) -> None:
    async with running(settings) as at:
        wanted = job(checkpoint_every=2)
        handle = await at.client.submit(wanted.spec, training=wanted.training)
        await reach(handle, 4)
        await handle.cancel()
        with pytest.raises(JobFailed, match="cancelled"):
            await handle.wait(WAIT_SECONDS)
        assert await handle.checkpoints()
        assert (await handle.cancel()).state == "cancelled"


async def test_a_restarted_coordinator_goes_on_from_the_last_checkpoint(
    settings: ServiceSettings, tmp_path: Path, model: Path
) -> None:
    wanted = job(checkpoint_every=5)
    async with running(settings) as at:
        handle = await at.client.submit(wanted.spec, training=wanted.training)
        key = await at.service.store.create_key("alice")
        await reach(handle, 8)
    async with running(settings, key=key) as at:
        handle = await at.client.job(handle.job_id)
        assert (await handle.wait(WAIT_SECONDS)).state == "succeeded"
        assert [step.step for step in await handle.metrics()] == list(range(1, STEPS + 1))
        folder = await handle.download_adapter(tmp_path / "adapter")
        alone = train_reference(wanted, at.service.base_model, model, attention="sdpa")
        assert largest_difference(exported_weights(folder, at.service.base_model), alone) <= 2e-5


async def test_a_job_waits_for_a_device_and_says_so(settings: ServiceSettings) -> None:
    async with running(settings) as at:
        for device_id in ("device-0", "device-1"):
            await at.devices.kill(device_id)
        handle = await at.client.submit(job().spec, training=job().training)
        await until_state(handle, "running")
        assert (await handle.refresh()).waiting_reason == "waiting for a device: no device is connected"
        at.devices.start("late", at.service.endpoint)
        assert (await handle.wait(WAIT_SECONDS)).state == "succeeded"


async def test_a_stored_spec_that_this_version_refuses_fails_its_job_with_a_reason(
    settings: ServiceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an upgrade: what the store holds was accepted by another version."""
    stored = JobStore.job

    async def older(store: JobStore, job_id: str) -> JobRecord:
        record = await stored(store, job_id)
        return replace(record, spec_json=record.spec_json.replace('"optimizer"', '"optimiser"'))

    monkeypatch.setattr(JobStore, "job", older)
    async with running(settings) as at:
        handle = await at.client.submit(job().spec, training=job().training)
        with pytest.raises(JobFailed, match="optimiser"):
            await handle.wait(WAIT_SECONDS)
        assert (await handle.refresh()).failure_reason == "STORED_SPEC_INVALID"


@pytest.fixture
def unable(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(device, job) of the leases that the first device asked refuses: it lacks the first job's module."""
    asked: list[tuple[str, str]] = []
    build = worker._session

    def refusing(grant: control_pb2.LeaseGrant, checkpoint: bytes | None) -> AdapterSession:
        lease = lease_from_proto(grant.lease)
        if not asked or (lease.device_id, lease.job_id) in asked:
            asked.append((lease.device_id, lease.job_id))
            raise InvalidInput("ADAPTER_MODULE_UNKNOWN", "no adapter module is registered as 'gated'")
        return build(grant, checkpoint)

    monkeypatch.setattr(worker, "_session", refusing)
    return asked


async def test_a_job_that_one_device_cannot_train_goes_to_another(
    settings: ServiceSettings, unable: list[tuple[str, str]]
) -> None:
    async with running(settings) as at:
        handle = await at.client.submit(job().spec, training=job().training)
        assert (await handle.wait(WAIT_SECONDS)).state == "succeeded"
        ((refused_by, job_id),) = unable
        assert job_id == handle.job_id
        assert {step.device_id for step in await handle.metrics()} == {"device-0", "device-1"} - {refused_by}


async def test_a_job_that_no_device_can_train_waits_and_says_why_and_holds_up_nobody(
    settings: ServiceSettings, unable: list[tuple[str, str]]
) -> None:
    async with running(settings) as at:
        await at.devices.kill("device-1")
        handle = await at.client.submit(job().spec, training=job().training)
        async with asyncio.timeout(WAIT_SECONDS):
            async for event in handle.events():
                if event.kind == "lease.lost":
                    break
        other = await at.client.submit(job(1).spec, training=job(1).training)
        assert (await other.wait(WAIT_SECONDS)).state == "succeeded"
        reason = (await handle.refresh()).waiting_reason
        assert reason.startswith("waiting for a device: device-0 cannot train it: ADAPTER_MODULE_UNKNOWN")
        assert unable == [("device-0", handle.job_id)], "asked once"
        at.devices.start("able", at.service.endpoint)
        assert (await handle.wait(WAIT_SECONDS)).state == "succeeded"
        assert unable == [("device-0", handle.job_id)]


async def test_generation_uses_the_adapter_while_training_and_after(settings: ServiceSettings) -> None:
    async with running(settings) as at:
        handle = await at.client.submit(job().spec, training=job().training)
        await reach(handle, 2)
        during = await handle.generate("river ", max_new_tokens=4)
        await handle.wait(WAIT_SECONDS)
        after = await handle.generate("river ", max_new_tokens=4)
        bare = await at.client.generate("river ", max_new_tokens=4)
        assert during.adapter_version >= 2
        assert after.adapter_version == STEPS
        assert bare.adapter_version == 0


async def test_a_diverging_job_fails_with_its_reason_and_leaves_its_neighbour_alone(
    settings: ServiceSettings, tmp_path: Path, model: Path
) -> None:
    async with running(settings) as at:
        template = job()
        wild = template.spec.model_copy(
            update={
                "name": "wild",
                "adapter": template.spec.adapter.model_copy(update={"alpha": 65536.0}),
                "optimizer": OptimizerSpec(kind="sgd", learning_rate=100.0),
            }
        )
        diverging = await at.client.submit(wild, training=template.training)
        calm = await at.client.submit(template.spec, training=template.training)
        await calm.wait(WAIT_SECONDS)
        with pytest.raises(JobFailed) as failure:
            await diverging.wait(WAIT_SECONDS)
        assert failure.value.reason in ("NON_FINITE_GRADIENT", "UPDATE_TOO_LARGE")
        folder = await calm.download_adapter(tmp_path / "adapter")
        alone = train_reference(template, at.service.base_model, model, attention="sdpa")
        assert largest_difference(exported_weights(folder, at.service.base_model), alone) <= 2e-5
