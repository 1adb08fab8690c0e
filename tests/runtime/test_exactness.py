"""Tenants trained mixed (one merged) through Ray and gRPC end with the adapters that peft gives alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cola_runtime.testing.exactness import (
    four_tenants,
    largest_difference,
    service_for,
    train_mixed,
    train_reference,
)
from cola_runtime.testing.tiny_models import save_tiny_model

STEPS = 20
ENCODINGS = ("activations", "adapter_gradient")


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "dtype", "bound"),
    [
        ("llama", "float32", 2e-5),
        ("gpt2", "float64", 1e-9),
    ],
)
async def test_mixed_tenants_end_with_the_adapters_that_peft_gives_alone(
    kind: str, dtype: str, bound: float, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    model = save_tiny_model(kind, tmp_path / "model", dtype=dtype)
    jobs = [job for encoding in ENCODINGS for job in four_tenants(kind, steps=STEPS, encoding=encoding)]
    jobs[0] = replace(jobs[0], spec=jobs[0].spec.model_copy(update={"mode": "merged"}))
    settings = service_for(tmp_path / "service", model=model, name=kind, dtype=dtype, token_budget=2048)
    mixed = await train_mixed(settings, jobs)
    microbatches = sum(STEPS * job.spec.adaptation_interval for job in jobs)
    assert mixed.base_steps < 0.9 * microbatches, "the tenants shared base steps"
    for job in jobs:
        alone = train_reference(job, mixed.base, model, attention="sdpa")
        difference = largest_difference(mixed.weights[job.spec.name], alone)
        assert difference <= bound, f"{job.spec.name}: {difference:.2e}"
