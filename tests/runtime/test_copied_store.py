"""A service that goes on in another database: its lists, its keys, and a paused job's very bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import SecretStr

from cola_runtime.cli.main import main
from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.config import ServiceSettings
from cola_runtime.testing.exactness import four_tenants, service_for
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model
from tests.postgres import PostgresServer

WAIT_SECONDS = 60.0
STEPS, PAUSED_AT = 8, 4


@pytest.fixture
def database(postgres: PostgresServer) -> Iterator[str]:
    made = postgres.new_database()
    yield made
    postgres.drop(made)


async def lists(client: AsyncClient) -> dict[str, Any]:
    """Everything that a tenant can ask for."""
    found: dict[str, Any] = {"jobs": await client.jobs(), "usage": await client.usage()}
    for job in found["jobs"]:
        handle = await client.job(job.job_id)
        found[job.job_id] = (
            [event async for event in handle.events(follow=False)],
            await handle.metrics(),
            await handle.checkpoints(),
        )
    return found


async def train(client: AsyncClient, name: str, *, pause: bool) -> AsyncJobHandle:
    """With `pause`, until it is paused in the middle; else to its end."""
    job = four_tenants("tiny", steps=STEPS, encoding="auto")[0]
    spec = job.spec.model_copy(update={"name": name, "checkpoint_every": 2})
    handle = await client.submit(spec, training=job.training)
    if not pause:
        await handle.wait(WAIT_SECONDS)
        return handle
    async for event in handle.events():
        if event.kind == "step.applied" and event.data["step"] == PAUSED_AT - 1:
            await handle.pause()
        if event.kind == "job.paused":
            break
    return handle


async def test_a_service_goes_on_in_the_database_that_its_store_was_copied_to(
    tmp_path: Path, database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    model = save_tiny_model("gpt2", tmp_path / "model")
    folder = tmp_path / "service"
    settings: ServiceSettings = service_for(folder, model=model, name="tiny", dtype="float32")
    async with running_in_process(settings) as (service, _):
        key = service.first_key
        async with AsyncClient(base_url=f"grpc://{service.endpoint}", api_key=key) as client:
            whole = await train(client, "whole", pause=False)
            expected = (await whole.checkpoints())[-1].sha256
            paused = await train(client, "paused", pause=True)
            before = await lists(client)
    with pytest.raises(SystemExit) as ended:
        await asyncio.to_thread(main, ["store", "copy", str(folder), database])
    assert not ended.value.code
    assert "Set COLA_DATABASE=postgresql://" in capsys.readouterr().out
    moved = settings.model_copy(update={"database": SecretStr(database)})
    async with (
        running_in_process(moved) as (service, _),
        AsyncClient(base_url=f"grpc://{service.endpoint}", api_key=key) as client,
    ):
        assert service.first_key is None
        assert await lists(client) == before
        handle = await client.job(paused.job_id)
        await handle.resume()
        await handle.wait(WAIT_SECONDS)
        assert (await handle.checkpoints())[-1].sha256 == expected
