"""Jobs beside a float16 base, from spec to exported adapter: scaled by default, refused what cannot be."""

from __future__ import annotations

import json
import logging
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from cola_runtime.errors import InvalidInput
from cola_runtime.jobs import plan
from cola_runtime.spec import JobSpec
from cola_runtime.spec_parsing import parse_job_spec
from cola_runtime.testing.exactness import (
    Weights,
    exported_weights,
    largest_difference,
    service_for,
    tenant_client,
)
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model

WAIT_SECONDS = 60.0
ROWS = b"".join(
    json.dumps({"prompt": "ab" * n, "completion": "cde"[: 1 + n % 3]}).encode() + b"\n" for n in range(1, 8)
)


def job(name: str, **fields: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": name,
            "base_model": "tiny",
            "adapter": {"rank": 3, "alpha": 6},
            "steps": 3,
            "rows_per_step": 3,
            "optimizer": {"kind": "sgd", "learning_rate": 0.05},
            "seed": 5,
            **fields,
        }
    )


JOBS = [
    job("dynamic"),
    job("interval", encoding="activations", adaptation_interval=2),
    job("fixed", encoding="weight_gradient", loss_scaling=4096),
]


async def train(folder: Path, model: Path, jobs: list[JobSpec], dtype: str) -> dict[str, Weights]:
    settings = service_for(folder, model=model, name="tiny", dtype=dtype, token_budget=1024)
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(await tenant_client(service, spec.name)) for spec in jobs]
        handles = [
            await client.submit(spec, training=ROWS) for client, spec in zip(clients, jobs, strict=True)
        ]
        trained = {}
        for handle in handles:
            await handle.wait(WAIT_SECONDS)
            exported = await handle.download_adapter(folder / handle.name)
            trained[handle.name] = exported_weights(exported, service.base_model)
        if dtype == "float16":
            with pytest.raises(InvalidInput) as caught:
                await clients[0].submit(job("merged", mode="merged"), training=ROWS)
            assert caught.value.reason == "MERGED_DTYPE"
        return trained


async def test_jobs_train_beside_float16_as_beside_float32(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a first scale at which everything overflows, so that both dynamic jobs have to come down."""
    torch.set_num_threads(1)
    monkeypatch.setattr(plan, "FIRST_LOSS_SCALE", 2.0**30)
    caplog.set_level(logging.INFO, logger="cola_runtime.base_model.loss_scales")
    model = save_tiny_model("llama", tmp_path / "model", dtype="float16")
    half = await train(tmp_path / "half", model, JOBS, "float16")
    lowered = {record.job_id for record in caplog.records if hasattr(record, "job_id")}
    assert len(lowered) == 2
    wide = await train(tmp_path / "wide", model, JOBS, "float32")
    for name, weights in wide.items():
        assert largest_difference(half[name], weights) < 1e-2


@pytest.mark.parametrize("wrong", [3, 0.5, "half", 2**30])
def test_a_scale_that_cannot_be_divided_out_exactly_is_refused(wrong: Any) -> None:
    fields = {"name": "a", "base_model": "tiny", "loss_scaling": wrong}
    with pytest.raises(InvalidInput) as caught:
        parse_job_spec(fields)
    assert caught.value.reason == "SPEC_INVALID"
