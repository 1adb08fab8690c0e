"""`max_staleness: 1` trains exactly by delayed gradients; what follows a checkpoint depends on it alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.config import ServiceSettings
from cola_runtime.data.cursor import step_rows
from cola_runtime.data.formats import parse_dataset
from cola_runtime.data.tokenize import Tokenizer
from cola_runtime.jobs.plan import training_plan
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


async def train(
    settings: ServiceSettings,
    jobs: list[MixedJob],
    *,
    evaluation: bytes | None = None,
    meanwhile: Callable[[AsyncJobHandle, InProcessDevices], Any] | None = None,
) -> tuple[BaseModelDescription, list[dict[TensorKey, Tensor]]]:
    """The exported adapters of jobs that one tenant submits together."""
    async with running_in_process(settings) as (service, devices):
        client = await tenant_client(service, "alice")
        async with client:
            handles = [
                await client.submit(each.spec, training=each.training, evaluation=evaluation) for each in jobs
            ]
            if meanwhile is not None:
                await meanwhile(handles[0], devices)
            weights = []
            for number, handle in enumerate(handles):
                await handle.wait(WAIT_SECONDS)
                steps = await handle.metrics()
                assert [each.step for each in steps] == list(range(1, STEPS + 1))
                sent = [each.bytes_up for each in steps]
                assert "activations" in handle.name or max(sent) - min(sent) < 100, (
                    "each step has its own bytes"
                )
                folder = await handle.download_adapter(settings.data_dir / f"adapter-{number}")
                weights.append(exported_weights(folder, service.base_model))
            return service.base_model, weights


async def test_delayed_gradients_are_what_max_staleness_1_gives_in_every_encoding(
    settings: ServiceSettings, model: Path
) -> None:
    jobs = [job(encoding) for encoding in ENCODINGS]
    base, trained = await train(settings, jobs)
    expected = delayed_training(jobs[0], base, model, exact=lambda step: step == 0)
    for weights, encoding in zip(trained, ENCODINGS, strict=True):
        assert largest_difference(weights, expected) <= BOUND, encoding
    exact = delayed_training(jobs[0], base, model, exact=lambda step: True)
    assert largest_difference(expected, exact) > 1e-3, "the delay can be seen"


async def test_no_staleness_is_exact(settings: ServiceSettings, model: Path) -> None:
    wanted = job(max_staleness=0)
    base, (weights,) = await train(settings, [wanted])
    assert (
        largest_difference(weights, delayed_training(wanted, base, model, exact=lambda step: True)) <= BOUND
    )


async def test_the_step_behind_a_checkpoint_or_an_evaluation_is_exact(
    settings: ServiceSettings, model: Path
) -> None:
    wanted = job(checkpoint_every=6, evaluation=EvaluationSpec(every=4, keep_best=False))
    base, (weights,) = await train(settings, [wanted], evaluation=wanted.training)
    expected = delayed_training(wanted, base, model, exact=lambda step: step % 6 == 0 or step % 4 == 0)
    assert largest_difference(weights, expected) <= BOUND


async def test_a_job_that_lost_its_device_ends_as_one_that_did_not(
    settings: ServiceSettings, model: Path
) -> None:
    async def kill_in_the_middle(handle: AsyncJobHandle, devices: InProcessDevices) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            async for event in handle.events():
                if event.kind == "step.applied" and event.data["step"] >= 7:
                    await devices.kill(event.data["device_id"])
                    return

    wanted = job(checkpoint_every=5)
    base, (weights,) = await train(settings, [wanted], meanwhile=kill_in_the_middle)
    expected = delayed_training(wanted, base, model, exact=lambda step: step % 5 == 0)
    assert largest_difference(weights, expected) <= BOUND


async def test_a_pause_lets_the_step_that_ran_ahead_end(settings: ServiceSettings) -> None:
    async def pause_and_resume(handle: AsyncJobHandle, devices: InProcessDevices) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            async for event in handle.events():
                if event.kind == "step.applied" and event.data["step"] == 3:
                    await handle.pause()
                elif event.kind == "job.paused":
                    break
        paused = await handle.refresh()
        assert (await handle.checkpoints())[-1].version == paused.version
        await handle.resume()

    await train(settings, [job()], meanwhile=pause_and_resume)
