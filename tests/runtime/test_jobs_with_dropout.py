"""LoRA dropout through the whole service: one adapter, however its rows are mixed, split and resumed."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import torch

from cola_runtime.adapters.peft_files import CONFIG_FILE
from cola_runtime.spec import JobSpec
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
    adapter = {"rank": 3, "alpha": 6, "dropout": 0.25, **fields.pop("adapter", {})}
    return JobSpec.model_validate(
        {
            "name": name,
            "base_model": "tiny",
            "adapter": adapter,
            "passes": 2,
            "rows_per_step": 3,
            "optimizer": {"learning_rate": 2e-3},
            "seed": 5,
            **fields,
        }
    )


async def train(folder: Path, model: Path, jobs: list[JobSpec], *, token_budget: int) -> dict[str, Weights]:
    settings = service_for(folder, model=model, name="tiny", dtype="float64", token_budget=token_budget)
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
        return trained


async def test_masks_follow_the_row_whatever_the_mix_the_interval_the_split_and_the_encoding(
    tmp_path: Path,
) -> None:
    torch.set_num_threads(1)
    model = save_tiny_model("gpt2", tmp_path / "model", dtype="float64")
    alone = (await train(tmp_path / "alone", model, [job("alone")], token_budget=1024))["alone"]
    jobs = [
        job("interval", adaptation_interval=3),
        job("activations", encoding="activations", adaptation_interval=2),
        job("plain", adapter={"dropout": 0.0}),
    ]
    mixed = await train(tmp_path / "mixed", model, jobs, token_budget=24)
    assert largest_difference(mixed["interval"], alone) < 1e-9
    assert largest_difference(mixed["activations"], alone) < 1e-9
    assert largest_difference(mixed["plain"], alone) > 1e-2
    written = {
        name: json.loads((tmp_path / "mixed" / name / CONFIG_FILE).read_bytes())["lora_dropout"]
        for name in ("interval", "plain")
    }
    assert written == {"interval": 0.25, "plain": 0.0}
