"""Collaborating, merged and unmerged tenants at once, on a whole service in one process."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from cola_runtime.base_model.model import TappedModel
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.spec import CollaborationSpec
from cola_runtime.testing.exactness import (
    MixedJob,
    exported_weights,
    four_tenants,
    largest_difference,
    service_for,
    tenant_client,
    train_reference,
)
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import ModelKind, save_tiny_model
from cola_runtime.types import BaseStep, Gang

STEPS = 30
WAIT_SECONDS = 60.0
GROUP = CollaborationSpec(group="a-name-that-nobody-guesses")
MERGED: dict[str, Any] = {"mode": "merged"}
TOGETHER: dict[str, Any] = {"mode": "merged", "collaboration": GROUP}


def jobs(modes: list[dict[str, Any]]) -> list[MixedJob]:
    templates = four_tenants("tiny", steps=STEPS, encoding="auto")
    return [
        MixedJob(spec=template.spec.model_copy(update=mode), training=template.training)
        for template, mode in zip(templates, modes, strict=True)
    ]


@pytest.fixture
def gangs_of_steps(monkeypatch: pytest.MonkeyPatch) -> list[list[Gang | None]]:
    """Per training base step, the gang of every segment."""
    seen: list[list[Gang | None]] = []
    run = TappedModel.run

    def watched(self: TappedModel, step: BaseStep, *how: Any, **told: Any) -> Any:
        if step.train:
            seen.append([segment.gang for segment in step.segments])
        return run(self, step, *how, **told)

    monkeypatch.setattr(TappedModel, "run", watched)
    return seen


async def reach(handle: AsyncJobHandle, version: int) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        async for event in handle.events():
            if event.kind == "step.applied" and event.data["step"] >= version:
                return


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
async def test_collaborators_leave_unmerged_and_lone_merged_tenants_as_if_alone(
    kind: ModelKind, tmp_path: Path, gangs_of_steps: list[list[Gang | None]]
) -> None:
    torch.set_num_threads(1)
    model = save_tiny_model(kind, tmp_path / "model")
    settings = service_for(tmp_path / "service", model=model, name="tiny", dtype="float32")
    wanted = jobs([TOGETHER, TOGETHER, {}, MERGED])
    weights = []
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(await tenant_client(service, f"tenant-{n}")) for n in range(4)
        ]
        before = await clients[0].generate("river ", max_new_tokens=8)
        handles = [
            await client.submit(job.spec, training=job.training, evaluation=job.training)
            for client, job in zip(clients, wanted, strict=True)
        ]
        await reach(handles[0], 3)
        assert (await handles[0].generate("river ", max_new_tokens=4)).adapter_version >= 3
        for handle in handles:
            assert (await handle.wait(WAIT_SECONDS)).state == "succeeded"
            weights.append(
                exported_weights(await handle.download_adapter(tmp_path / handle.job_id), service.base_model)
            )
        assert (await clients[0].generate("river ", max_new_tokens=8)).text == before.text
        alone = [train_reference(job, service.base_model, model, attention="sdpa") for job in wanted]
    differences = [largest_difference(mixed, lone) for mixed, lone in zip(weights, alone, strict=True)]
    assert max(differences[2:]) <= 2e-5, "unmerged, and merged alone"
    assert min(differences[:2]) > 1e-2, "a collaborator learns in its group's company"
    assert all(len(set(gangs)) == 1 for gangs in gangs_of_steps)
    assert any(gangs.count(gangs[0]) == 2 for gangs in gangs_of_steps), "collaborators share base steps"


async def test_a_collaborator_whose_device_dies_goes_on_and_its_group_with_it(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = save_tiny_model("gpt2", tmp_path / "model")
    settings = service_for(tmp_path / "service", model=model, name="tiny", dtype="float32")
    async with (
        running_in_process(settings) as (service, devices),
        await tenant_client(service, "a") as client,
    ):
        handles = [
            await client.submit(job.spec, training=job.training)
            for job in jobs([TOGETHER, TOGETHER, MERGED, TOGETHER])
        ]
        await reach(handles[0], 5)
        await devices.kill("device-0")
        for handle in handles:
            assert (await handle.wait(WAIT_SECONDS)).state == "succeeded"
            assert [step.step for step in await handle.metrics()] == list(range(1, STEPS + 1))
