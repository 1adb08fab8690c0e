"""Trap 4 of the method: an adaptation interval changes memory and latency, never the adapter.

Microbatches weigh by their label tokens, the rest of a pass is a smaller step of its own, and the schedule
ticks once a step: what comes out is what one batch a step gives, trained alone by stock peft and torch.
"""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch

from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.runtime.coordinator import RunningService
from cola_runtime.spec import JobSpec
from cola_runtime.testing.exactness import (
    MixedJob,
    exported_weights,
    largest_difference,
    service_for,
    tenant_client,
    train_reference,
)
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model

WAIT_SECONDS = 60.0
LEARNING_RATE = 2e-3
ROWS = b"".join(
    json.dumps({"prompt": "q" * (1 + n % 3), "completion": "a b c d e f g"[: 1 + 2 * n]}).encode() + b"\n"
    for n in range(7)
)  # 1 to 13 label tokens: equal weights for the microbatches would show


def job(interval: int, optimizer: str) -> MixedJob:
    spec = {
        "name": f"interval-{interval}",
        "base_model": "tiny",
        "adapter": {"rank": 3, "alpha": 6},
        "passes": 2,
        "rows_per_step": 3,
        "adaptation_interval": interval,
        "optimizer": {
            "kind": optimizer,
            "learning_rate": LEARNING_RATE,
            "max_grad_norm": 0.5,
            "weight_decay": 0.01,
        },
        "schedule": {"kind": "cosine", "warmup_steps": 2},
        "seed": 5,
    }
    return MixedJob(spec=JobSpec.model_validate(spec), training=ROWS)


def torchs_rates(steps: int, warmup: int) -> list[float]:
    """Of torch's own schedulers, ticked once a step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LEARNING_RATE)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, total_iters=warmup - 1)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [warmup])
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    return rates


async def trained(
    service: RunningService, jobs: list[MixedJob], stack: AsyncExitStack
) -> list[AsyncJobHandle]:
    clients = [await stack.enter_async_context(await tenant_client(service, job.spec.name)) for job in jobs]
    handles = [
        await client.submit(job.spec, training=job.training)
        for client, job in zip(clients, jobs, strict=True)
    ]
    for handle in handles:
        await handle.wait(WAIT_SECONDS)
    return handles


@pytest.mark.parametrize(("token_budget", "optimizer"), [(1024, "adamw"), (24, "adafactor")])
async def test_trap_4_every_interval_trains_as_one_batch_a_step_would(
    tmp_path: Path, token_budget: int, optimizer: str
) -> None:
    """The small budget splits microbatches into base steps of their own, which must not show either."""
    torch.set_num_threads(1)
    model = save_tiny_model("gpt2", tmp_path / "model", dtype="float64")
    settings = service_for(
        tmp_path / "service", model=model, name="tiny", dtype="float64", token_budget=token_budget
    )
    jobs = [job(interval, optimizer) for interval in (1, 2, 3)]
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        handles = await trained(service, jobs, stack)
        alone = train_reference(jobs[0], service.base_model, model, attention="sdpa")
        for handle in handles:
            folder = await handle.download_adapter(tmp_path / handle.name)
            assert largest_difference(exported_weights(folder, service.base_model), alone) <= 1e-9
            steps = await handle.metrics()
            assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
            assert [step.learning_rate for step in steps] == pytest.approx(torchs_rates(6, 2), rel=1e-12)
            assert sum(step.label_tokens for step in steps[:3]) == sum(s.label_tokens for s in steps[3:])
            assert steps[2].tokens < min(steps[0].tokens, steps[1].tokens)
