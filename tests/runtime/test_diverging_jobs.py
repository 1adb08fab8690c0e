"""A job whose loss explodes ends or pauses by its watchdog, and its last checkpoint stays."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cola_runtime.base_model.service import BaseModelService
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.errors import JobFailed
from cola_runtime.spec import WatchdogSpec
from cola_runtime.testing.exactness import MixedJob, four_tenants, service_for, tenant_client
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model
from cola_runtime.types import BaseStep, BaseStepResult

STEPS = 30
EXPLODES_BEHIND = 15


@pytest.fixture
def exploding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of versions above EXPLODES_BEHIND are a hundred times what they are."""
    run = BaseModelService.run

    async def larger(service: BaseModelService, step: BaseStep) -> BaseStepResult:
        result = await run(service, step)
        factors = [100.0 if segment.version > EXPLODES_BEHIND else 1.0 for segment in step.segments]
        losses = zip(result.losses, factors, strict=True)
        return replace(result, losses=tuple(replace(one, loss_sum=one.loss_sum * by) for one, by in losses))

    monkeypatch.setattr(BaseModelService, "run", larger)


def watched(action: str) -> MixedJob:
    template = four_tenants("tiny", steps=STEPS, encoding="auto")[0]
    changes = {"name": action, "checkpoint_every": 5, "watchdog": WatchdogSpec(action=action, patience=2)}
    return MixedJob(spec=template.spec.model_copy(update=changes), training=template.training)


async def paused(handle: AsyncJobHandle) -> str:
    """The sentence with which the job paused."""
    async with asyncio.timeout(60):
        async for event in handle.events():
            if event.kind == "job.paused":
                return event.message
    raise AssertionError("the job ended")


async def test_a_job_whose_loss_explodes_is_ended_by_its_watchdog(tmp_path: Path, exploding: None) -> None:
    torch.set_num_threads(1)
    model = save_tiny_model("gpt2", tmp_path / "model")
    settings = service_for(tmp_path / "service", model=model, name="tiny", dtype="float32")
    async with running_in_process(settings) as (service, _), await tenant_client(service, "alice") as client:
        failing, pausing = watched("fail"), watched("pause")
        ended = await client.submit(failing.spec, training=failing.training)
        kept = await client.submit(pausing.spec, training=pausing.training)
        with pytest.raises(JobFailed, match="Lower the learning rate") as caught:
            await ended.wait(60)
        assert caught.value.reason == "LOSS_DIVERGED"
        assert "paused by its watchdog" in await paused(kept)
        for handle in (ended, kept):
            assert (await handle.refresh()).version == EXPLODES_BEHIND + 3, "behind two exploded losses"
            assert (await handle.checkpoints())[-1].version == EXPLODES_BEHIND
            assert "watchdog.acted" in [each.kind async for each in handle.events(follow=False)]
