"""Planned and compressed jobs through a whole service in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cola_runtime.base_model.model import TappedModel
from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.values import Job
from cola_runtime.config import PlannerSettings, ServiceSettings
from cola_runtime.encodings import Encoding, TapPlan
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
from cola_runtime.testing.tiny_models import save_tiny_model
from cola_runtime.types import BaseStep

WAIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings(model: Path, tmp_path: Path) -> ServiceSettings:
    slow_link = PlannerSettings(link_bytes_per_second=1e6)
    service = service_for(tmp_path / "service", model=model, name="tiny", dtype="float32")
    return service.model_copy(update={"planner": slow_link})


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> set[TapPlan]:
    """Of every segment that any base model trains."""
    seen: set[TapPlan] = set()
    run = TappedModel.run

    def spy(self: TappedModel, step: BaseStep, *how: Any, **told: Any) -> object:
        seen.update(segment.taps for segment in step.segments if step.train)
        return run(self, step, *how, **told)

    monkeypatch.setattr(TappedModel, "run", spy)
    return seen


def job(**changes: object) -> MixedJob:
    template = four_tenants("tiny", steps=12, encoding="auto")[0]
    fields = template.spec.model_dump() | {"checkpoint_every": 3} | changes
    return MixedJob(spec=type(template.spec).model_validate(fields), training=template.training)


async def test_a_mixed_plan_trains_exactly_and_a_restarted_coordinator_plans_alike(
    settings: ServiceSettings, plans: set[TapPlan], tmp_path: Path, model: Path
) -> None:
    """Rank 24 at some 30 tokens: sites that share an x send activations, the others gradients."""
    wanted = job(adapter={"rank": 24, "alpha": 24}, rows_per_step=1)
    async with running_in_process(settings) as (service, _), await tenant_client(service, "alice") as client:
        handle = await client.submit(wanted.spec, training=wanted.training)
        key = await service.store.create_key("alice")
        async for event in handle.events():
            if event.kind == "step.applied" and event.data["step"] >= 4:
                break
    assert len(plans) == 1
    (plan,) = plans
    assert {plan.encoding, *(encoding for _, encoding in plan.exceptions)} >= {
        Encoding.ACTIVATIONS,
        Encoding.ADAPTER_GRADIENT,
    }
    async with running_in_process(settings) as (service, _):
        async with AsyncClient(base_url=f"grpc://{service.endpoint}", api_key=key) as client:
            handle = await client.job(handle.job_id)
            done = await handle.wait(WAIT_SECONDS)
            assert done.encoding == "mixed"
            folder = await handle.download_adapter(tmp_path / "adapter")
        alone = train_reference(wanted, service.base_model, model, attention="sdpa")
        assert largest_difference(exported_weights(folder, service.base_model), alone) <= 2e-5
    assert plans == {plan}


async def test_a_compressed_job_sends_fewer_bytes_and_still_learns(
    settings: ServiceSettings, plans: set[TapPlan]
) -> None:
    full_rank = {"adapter": {"kind": "linear"}, "encoding": "weight_gradient", "rows_per_step": 4}
    asked = [
        {"compression": "none"},
        {"compression": "bfloat16"},
        {"compression": "int8"},
        {**full_rank, "compression": "none"},
        {**full_rank, "compression": "low_rank", "adaptation_interval": 2},
    ]
    jobs: list[Job] = []
    async with running_in_process(settings) as (service, _), await tenant_client(service, "alice") as client:
        for number, fields in enumerate(asked):
            wanted = job(name=f"job-{number}", **fields)
            handle = await client.submit(wanted.spec, training=wanted.training, evaluation=wanted.training)
            jobs.append(await handle.wait(WAIT_SECONDS))
    for done in jobs:
        assert done.evaluation_loss_after is not None and done.evaluation_loss_before is not None
        assert done.evaluation_loss_after < done.evaluation_loss_before
    names = [done.encoding for done in jobs]
    assert names[:3] == ["adapter_gradient", "adapter_gradient+bfloat16", "adapter_gradient+int8"]
    assert names[3:] == ["weight_gradient", "weight_gradient+low_rank"]
    assert {str(plan) for plan in plans} == set(names)
    plain, half, quarter, product, factors = (done.bytes_up for done in jobs)
    assert plain > 1.5 * half > 1.5 * 1.15 * quarter  # tiny tensors: headers weigh
    assert product > 2 * factors  # though sent twice a step
