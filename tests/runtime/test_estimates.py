"""What is estimated of a job is what is counted after it has run; nothing is created by asking."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch

from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.base_model.model import TappedModel
from cola_runtime.client.values import Job, JobEstimate
from cola_runtime.errors import InvalidInput, QuotaExceeded
from cola_runtime.jobs.bank_size import bank_bytes
from cola_runtime.jobs.plan import training_plan
from cola_runtime.spec import JobSpec
from cola_runtime.testing.exactness import MixedJob, four_tenants, service_for, tenant_client
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model
from cola_runtime.types import Lease

STEPS = 3
WAIT_SECONDS = 60.0
TOKEN_BUDGET = 150  # some microbatches go in parts


def jobs() -> list[MixedJob]:
    """Every encoding and compression, several kinds; passes that end with a smaller step; held-out rows."""
    first, second, third, fourth = four_tenants("tiny", steps=STEPS, encoding="auto")
    changes: list[tuple[MixedJob, dict[str, object]]] = [
        (first, {"encoding": "adapter_gradient"}),
        (second, {"encoding": "weight_gradient", "steps": None, "passes": 1, "rows_per_step": 5}),
        (third, {"encoding": "adapter_gradient", "compression": "int8"}),
        (fourth, {"encoding": "activations"}),
        (first, {"adapter": {"kind": "linear", "target_modules": "attention"}, "compression": "low_rank"}),
        (fourth, {"adapter": {"kind": "linearized_lora", "rank": 2}, "compression": "bfloat16"}),
    ]
    return [
        MixedJob(
            spec=JobSpec.model_validate({**job.spec.model_dump(), **changed, "name": f"job-{n}"}),
            training=b"".join(job.training.splitlines(keepends=True)[:9]),
        )
        for n, (job, changed) in enumerate(changes)
    ]


def check(estimate: JobEstimate, ran: Job, spec: JobSpec) -> None:
    assert (estimate.steps, estimate.tokens) == (ran.version, ran.tokens)
    assert (estimate.label_tokens, estimate.evaluation_tokens) == (ran.label_tokens, ran.evaluation_tokens)
    assert (estimate.encoding, estimate.bytes_down) == (ran.encoding, ran.bytes_down)
    if spec.encoding == "activations":
        assert ran.bytes_up < estimate.bytes_up < 2 * ran.bytes_up
        assert any("a bound" in text for text in estimate.assumptions)
    else:
        assert estimate.bytes_up == ran.bytes_up


async def test_tokens_and_bytes_are_those_that_are_counted_afterwards(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = save_tiny_model("llama", tmp_path / "model")
    settings = service_for(
        tmp_path / "service", model=model, name="tiny", dtype="float32", token_budget=TOKEN_BUDGET
    )
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        client = await stack.enter_async_context(await tenant_client(service, "alice"))
        asked = jobs()
        held_out = {asked[0].spec.name: asked[0].training}
        data = [{"training": job.training, "evaluation": held_out.get(job.spec.name)} for job in asked]
        estimates = [
            await client.estimate(job.spec, **of_job) for job, of_job in zip(asked, data, strict=True)
        ]
        assert await client.jobs() == []
        handles = [await client.submit(job.spec, **of_job) for job, of_job in zip(asked, data, strict=True)]
        for job, estimate, handle in zip(asked, estimates, handles, strict=True):
            check(estimate, await handle.wait(WAIT_SECONDS), job.spec)
            assert 0 < estimate.base_seconds <= estimate.seconds < 3600


async def test_what_would_be_refused_is_refused_and_the_queue_is_counted(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = save_tiny_model("gpt2", tmp_path / "model")
    settings = service_for(tmp_path / "service", model=model, name="tiny", dtype="float32")
    settings = settings.model_copy(update={"devices": settings.devices.model_copy(update={"count": 0})})
    job = four_tenants("tiny", steps=STEPS, encoding="auto")[0]
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        alice = await stack.enter_async_context(await tenant_client(service, "alice"))
        bob = await stack.enter_async_context(await tenant_client(service, "bob"))
        alone = await alice.estimate(job.spec, training=job.training)
        assert (alone.share, alone.meets_deadline) == (1.0, None)
        assert any("no base step" in text for text in alone.assumptions)
        await alice.create_key("alice", weight=3.0, tokens_per_minute=1)
        await bob.submit(job.spec, training=job.training)
        await alice.submit(job.spec, training=job.training)
        deadline = {"deadline": {"seconds": alone.tokens}}
        late = JobSpec.model_validate({**job.spec.model_dump(), **deadline})
        beside = await alice.estimate(late, training=job.training)
        assert beside.share == pytest.approx(3 / 4 / 2)
        assert beside.seconds == pytest.approx(60 * beside.tokens)
        assert beside.meets_deadline is False
        await alice.create_key("alice", total_steps=STEPS)
        with pytest.raises(QuotaExceeded):
            await alice.estimate(job.spec, training=job.training)
        with pytest.raises(InvalidInput):
            await alice.estimate(job.spec, training=b"{}\n")


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter": {"rank": 3}},
        {"adapter": {"kind": "linear", "bias": True}, "max_staleness": 1},
        {"adapter": {"kind": "mlp", "hidden": 5}},
        {"adapter": {"kind": "linearized_lora", "rank": 2}},
        {"adapter": {"kind": "linearized_lora", "rank": 2, "initial_b": "zero"}},
        {"task": {"kind": "sequence_classification", "labels": 3}},
    ],
)
def test_memory_is_what_the_bank_holds(fields: dict[str, object], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = TappedModel.load(save_tiny_model("llama", tmp_path), dtype="bfloat16")
    base = model.describe("tiny", "")
    spec = JobSpec.model_validate({"name": "a", "base_model": "tiny", **fields})
    plan = training_plan(spec, base, total_steps=1)
    lease, weights = Lease(job_id="job-a", epoch=1, device_id="d"), initial_weights(plan.adapter)
    for version in range(1 + plan.max_staleness):
        model.install(lease, plan.adapter, version, weights, max_staleness=plan.max_staleness)
    assert bank_bytes(plan, base) == model.bank_bytes.model_device
