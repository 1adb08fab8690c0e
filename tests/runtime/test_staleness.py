"""`max_staleness: 1` trains exactly by delayed gradients; what follows a checkpoint depends on it alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_steps import when_recorded
from torch import Tensor

from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.config import ServiceSettings
from cola_runtime.data.cursor import step_rows
from cola_runtime.data.formats import parse_dataset
from cola_runtime.data.tokenize import Tokenizer
from cola_runtime.jobs.plan import training_plan
from cola_runtime.jobs.records import StepRecord
from cola_runtime.runtime.coordinator import RunningService
from cola_runtime.spec import EvaluationSpec
from cola_runtime.testing.exactness import (
    MixedJob,
    exported_weights,
    four_tenants,
    largest_difference,
    service_for,
    tenant_client,
)
from cola_runtime.testing.in_process import InProcessDevices, running_in_process
from cola_runtime.testing.peft_reference import adapter_parameters, batch_loss, peft_model
from cola_runtime.testing.tiny_models import save_tiny_model
from cola_runtime.types import BaseModelDescription, TensorKey

STEPS = 20
WAIT_SECONDS = 60.0
BOUND = 1e-10
ENCODINGS = ("activations", "weight_gradient", "adapter_gradient")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("model"), dtype="float64")


@pytest.fixture
def settings(model: Path, tmp_path: Path) -> ServiceSettings:
    return service_for(tmp_path / "service", model=model, name="tiny", dtype="float64")


def job(encoding: str = "auto", **changes: Any) -> MixedJob:
    """Two microbatches a step, so that one step's taps are told from the next one's."""
    template = four_tenants("tiny", steps=STEPS, encoding=encoding)[2]
    defaults = {"max_staleness": 1, "checkpoint_every": 1000}
    return MixedJob(spec=template.spec.model_copy(update={**defaults, **changes}), training=template.training)


def delayed_training(
    wanted: MixedJob, base: BaseModelDescription, model: Path, *, exact: Callable[[int], bool]
) -> dict[TensorKey, Tensor]:
    """AdamW over one weight history: step k's gradient is taken at version k if `exact(k)`, else at k - 1."""
    dataset = parse_dataset(wanted.training, file_name="training.jsonl")
    rows = Tokenizer(model).tokenize(dataset, max_length=base.context_length, loss=wanted.spec.loss).rows
    plan = training_plan(wanted.spec, base, total_steps=STEPS)
    stock = peft_model(model, plan.adapter, dtype="float64")
    parameters = adapter_parameters(stock, plan.adapter)
    weights = {key: tensor.clone() for key, tensor in initial_weights(plan.adapter).items()}
    hyper = plan.optimizer
    optimizer = torch.optim.AdamW(
        weights.values(),
        lr=hyper.learning_rate,
        betas=hyper.betas,
        eps=hyper.eps,
        weight_decay=hyper.weight_decay,
    )
    before = {key: tensor.clone() for key, tensor in weights.items()}
    for step in range(STEPS):
        seen = weights if exact(step) else before
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(seen[key])
        for parameter in parameters.values():
            parameter.grad = None
        batch_loss(stock, [row for part in step_rows(rows, wanted.spec, step) for row in part]).backward()  # type: ignore[no-untyped-call]
        before = {key: tensor.clone() for key, tensor in weights.items()}
        for key, tensor in weights.items():
            tensor.grad = parameters[key].grad
        optimizer.step()
    return weights


async def trained(
    handle: AsyncJobHandle, base: BaseModelDescription, folder: Path
) -> dict[TensorKey, Tensor]:
    """The exported adapter of a job that ended well, with every step recorded once."""
    await handle.wait(WAIT_SECONDS)
    steps = await handle.metrics()
    assert [each.step for each in steps] == list(range(1, STEPS + 1))
    sent = [each.bytes_up for each in steps]
    assert "activations" in handle.name or max(sent) - min(sent) < 100, "each step has its own bytes"
    return exported_weights(await handle.download_adapter(folder / handle.name), base)


@asynccontextmanager
async def running(
    settings: ServiceSettings,
) -> AsyncIterator[tuple[RunningService, InProcessDevices, AsyncClient]]:
    async with running_in_process(settings) as (service, devices), AsyncExitStack() as stack:
        client = await stack.enter_async_context(await tenant_client(service, "alice"))
        yield service, devices, client


async def test_delayed_gradients_are_what_max_staleness_1_gives_in_every_encoding(
    settings: ServiceSettings, tmp_path: Path, model: Path
) -> None:
    unmerged = [job(encoding) for encoding in ENCODINGS]
    merged = [job(encoding, mode="merged", name=f"merged-{encoding}") for encoding in ENCODINGS[::2]]
    jobs = [*unmerged, *merged]
    async with running(settings) as (service, _, client):
        base = service.base_model
        expected = delayed_training(jobs[0], base, model, exact=lambda step: step == 0)
        exact = delayed_training(jobs[0], base, model, exact=lambda step: True)
        assert largest_difference(expected, exact) > 1e-3, "the delay can be seen"
        handles = [await client.submit(each.spec, training=each.training) for each in jobs]
        for handle in handles:
            weights = await trained(handle, base, tmp_path)
            assert largest_difference(weights, expected) <= BOUND, handle.name


@pytest.mark.parametrize(
    ("changes", "exact"),
    [
        ({"max_staleness": 0}, lambda step: True),
        (
            {"checkpoint_every": 6, "evaluation": EvaluationSpec(every=4, keep_best=False)},
            lambda step: step % 6 == 0 or step % 4 == 0,
        ),
    ],
    ids=["no staleness", "behind checkpoints and evaluations"],
)
async def test_a_step_is_exact_where_nothing_may_run_ahead(
    settings: ServiceSettings,
    tmp_path: Path,
    model: Path,
    changes: dict[str, Any],
    exact: Callable[[int], bool],
) -> None:
    wanted = job(**changes)
    async with running(settings) as (service, _, client):
        handle = await client.submit(wanted.spec, training=wanted.training, evaluation=wanted.training)
        weights = await trained(handle, service.base_model, tmp_path)
        expected = delayed_training(wanted, service.base_model, model, exact=exact)
        assert largest_difference(weights, expected) <= BOUND


async def test_a_job_that_lost_its_device_ends_as_one_that_did_not(
    settings: ServiceSettings, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = job(checkpoint_every=5)
    async with running(settings) as (service, devices, client):
        when_recorded(service.store, 7, lambda step: devices.kill(step.device_id), monkeypatch)
        handle = await client.submit(wanted.spec, training=wanted.training)
        weights = await trained(handle, service.base_model, tmp_path)
        assert "job.rewound" in [event.kind async for event in handle.events(follow=False)]
        expected = delayed_training(wanted, service.base_model, model, exact=lambda step: step % 5 == 0)
        assert largest_difference(weights, expected) <= BOUND


async def test_a_pause_lets_the_step_that_ran_ahead_end_and_the_next_one_is_exact(
    settings: ServiceSettings, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = job()
    async with running(settings) as (service, _, client):

        async def pause(step: StepRecord) -> None:
            await (await client.job(step.job_id)).pause()

        when_recorded(service.store, 3, pause, monkeypatch)
        handle = await client.submit(wanted.spec, training=wanted.training)
        async with asyncio.timeout(WAIT_SECONDS):
            async for event in handle.events():
                if event.kind == "job.paused":
                    break
        assert (await handle.refresh()).version == 4
        assert [each.version for each in await handle.checkpoints()] == [4]
        await handle.resume()
        weights = await trained(handle, service.base_model, tmp_path)
        assert "lease.lost" not in [event.kind async for event in handle.events(follow=False)]
        expected = delayed_training(wanted, service.base_model, model, exact=lambda step: step in (0, 4))
        assert largest_difference(weights, expected) <= BOUND
