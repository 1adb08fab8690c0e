"""Image classification through a whole service: mixed, exact, measured and exported."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image as Pillow
from transformers import AutoImageProcessor, AutoModelForImageClassification

from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.adapters.adapter_files import HEAD_FILE
from cola_runtime.data.cursor import step_indices
from cola_runtime.errors import InvalidInput
from cola_runtime.jobs.plan import training_plan
from cola_runtime.spec import JobSpec
from cola_runtime.testing.architectures import WITHOUT_ATTENTION, save_image_classifier
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
from cola_runtime.testing.peft_reference import adapter_parameters, relative_difference
from cola_runtime.types import TensorKey, TensorKind

STEPS = 8
ROWS = 20
WAIT_SECONDS = 60.0
NAMES = ("dark", "light")


def picture(number: int, label: int, labels: int) -> Pillow.Image:
    """The brighter, the higher its class; of any size."""
    random = np.random.default_rng(number)
    values = random.integers(0, 96, (*random.integers(20, 60, 2), 3)) + 150 * label // labels
    return Pillow.fromarray(values.astype(np.uint8))


def encoded(image: Pillow.Image, number: int) -> bytes:
    content = io.BytesIO()
    image.save(content, "JPEG" if number % 2 else "PNG")
    return content.getvalue()


def examples(seed: int, labels: int) -> list[tuple[bytes, int]]:
    drawn = np.random.default_rng(seed).integers(0, labels, ROWS).tolist()
    return [(encoded(picture(1000 * seed + k, label, labels), k), label) for k, label in enumerate(drawn)]


def lines(rows: list[tuple[bytes, int]], names: tuple[str, ...] = ()) -> bytes:
    records = (
        {"image": base64.b64encode(image).decode(), "label": names[label] if names else label}
        for image, label in rows
    )
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def job(number: int, labels: int | tuple[str, ...], **fields: Any) -> MixedJob:
    count = labels if isinstance(labels, int) else len(labels)
    common: dict[str, Any] = {"base_model": "tiny", "steps": STEPS, "rows_per_step": 4, "seed": number}
    common["adapter"] = {"rank": 2 + number, "alpha": 8}
    common["optimizer"] = {"learning_rate": 2e-3, "max_grad_norm": 1.0}
    task = {"kind": "image_classification", "labels": labels}
    spec = JobSpec.model_validate({"name": f"judge-{number}", "task": task, **common, **fields})
    return MixedJob(
        spec=spec, training=lines(examples(number, count), () if isinstance(labels, int) else labels)
    )


async def train_all(folder: Path, model: Path, jobs: list[MixedJob]) -> tuple[Any, dict[str, Any]]:
    """(base model, per job: exported folder, finished job, its metrics)."""
    settings = service_for(
        folder / "service",
        model=model,
        name="tiny",
        dtype="float64",
        attention="auto" if model.name in WITHOUT_ATTENTION else "sdpa",
        token_budget=200,
    )
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        done: dict[str, Any] = {}

        async def run(wanted: MixedJob) -> None:
            client = await stack.enter_async_context(await tenant_client(service, wanted.spec.name))
            handle = await client.submit(wanted.spec, training=wanted.training, evaluation=wanted.training)
            finished = await handle.wait(WAIT_SECONDS)
            exported = await handle.download_adapter(folder / wanted.spec.name)
            events = [event async for event in handle.events(follow=False)]
            metrics = [event.data["metrics"] for event in events if event.kind == "evaluation.done"]
            done[wanted.spec.name] = {"folder": exported, "job": finished, "metrics": metrics}

        await asyncio.gather(*map(run, jobs))
        return service.base_model, done


def train_with_peft(wanted: MixedJob, base: Any, model: Path) -> dict[TensorKey, torch.Tensor]:
    """The job alone, by nothing but transformers, peft and torch.optim."""
    spec = training_plan(wanted.spec, base, total_steps=STEPS).adapter
    kind, site = spec.head
    stock = AutoModelForImageClassification.from_pretrained(
        model, num_labels=kind.labels, dtype=torch.float64, attn_implementation=base.details["attention"]
    )
    part = spec.parts[0]
    config = LoraConfig(
        r=part.kind.rank, lora_alpha=part.kind.alpha, target_modules=[s.name for s in part.sites]
    )
    lora = get_peft_model(stock, config, autocast_adapter_dtype=False).eval()
    head = stock.classifier.requires_grad_(True)
    parameters = dict(adapter_parameters(lora, spec.body)) | {
        TensorKey(site.index, TensorKind.WEIGHT): head.weight,
        TensorKey(site.index, TensorKind.BIAS): head.bias,
    }
    with torch.no_grad():
        for key, weight in initial_weights(spec).items():
            parameters[key].copy_(weight)
    trained = list(parameters.values())
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
    processor = AutoImageProcessor.from_pretrained(model)
    rows = examples(wanted.spec.seed, kind.labels)
    for step in range(STEPS):
        chosen = [rows[index] for part in step_indices(len(rows), wanted.spec, step) for index in part]
        images = [Pillow.open(io.BytesIO(content)) for content, _ in chosen]
        pixels = processor(images, return_tensors="pt")["pixel_values"].double()
        labels = torch.tensor([label for _, label in chosen])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(lora(pixel_values=pixels).logits, labels).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return {key: parameter.detach() for key, parameter in parameters.items()}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


async def test_tenants_of_a_vit_end_as_each_alone_with_peft(tmp_path: Path) -> None:
    model = save_image_classifier("vit", tmp_path / "vit", dtype="float64")
    jobs = [
        job(0, NAMES, evaluation={"every": 4, "metric": "accuracy"}),
        job(1, 5, adaptation_interval=2, encoding="activations"),
        job(2, 3, adapter={"rank": 3, "target_modules": "attention"}, mode="merged"),
        job(3, 2, adapter=[]),
    ]
    base, done = await train_all(tmp_path, model, jobs)
    for wanted in jobs:
        exported = exported_weights(done[wanted.spec.name]["folder"], base)
        alone = train_reference(wanted, base, model, attention=base.details["attention"])
        assert largest_difference(exported, alone) <= 1e-9, wanted.spec.name
    with_peft = train_with_peft(jobs[0], base, model)
    exported = exported_weights(done["judge-0"]["folder"], base)
    assert max(relative_difference(exported, with_peft).values()) <= 1e-9
    measured = done["judge-0"]["metrics"]
    assert len(measured) == 3
    assert measured[0].keys() == {"loss", "accuracy", "f1", "f1_macro", "matthews"}
    assert measured[-1]["loss"] < measured[0]["loss"]
    assert done["judge-1"]["metrics"][0].keys() == {"loss", "accuracy", "f1_macro", "matthews"}
    assert done["judge-0"]["job"].tokens == STEPS * 4 * base.context_length


async def test_an_export_loads_onto_the_stock_model(tmp_path: Path) -> None:
    model = save_image_classifier("convnext", tmp_path / "convnext", dtype="float64")
    wanted = job(0, 3, adapter={"rank": 2, "target_modules": "mlp"})
    _, done = await train_all(tmp_path, model, [wanted])
    folder = done["judge-0"]["folder"]
    stock = AutoModelForImageClassification.from_pretrained(
        model, num_labels=3, dtype=torch.float64, ignore_mismatched_sizes=True
    ).eval()
    head = safetensors.torch.load_file(folder / HEAD_FILE)
    stock.classifier.weight.data, stock.classifier.bias.data = head["score/weight"], head["score/bias"]
    loaded = PeftModel.from_pretrained(stock, folder, autocast_adapter_dtype=False).eval()
    content, labels = zip(*examples(0, 3), strict=True)
    processor = AutoImageProcessor.from_pretrained(model)
    images = [Pillow.open(io.BytesIO(each)) for each in content]
    pixels = processor(images, return_tensors="pt")["pixel_values"].double()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(loaded(pixel_values=pixels).logits, torch.tensor(labels))
    assert done["judge-0"]["metrics"][-1]["loss"] == pytest.approx(float(loss), rel=1e-9)


async def test_what_an_image_classifier_does_not_serve_is_refused_and_nothing_is_created(
    tmp_path: Path,
) -> None:
    model = save_image_classifier("vit", tmp_path / "model", dtype="float32")
    settings = service_for(tmp_path / "service", model=model, name="tiny", dtype="float32")
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        client = await stack.enter_async_context(await tenant_client(service, "alice"))
        writer = four_tenants("tiny", steps=STEPS, encoding="auto")[0]
        judge = job(1, NAMES)
        broken = judge.training + lines([(examples(1, 2)[0][0][:200], 0)], NAMES)
        for spec, data, reason in (
            (writer.spec, writer.training, "TASK_UNSUPPORTED"),
            (judge.spec, writer.training, "TASK_FORMAT"),
            (judge.spec, broken, "IMAGE_BROKEN"),
        ):
            with pytest.raises(InvalidInput) as caught:
                await client.submit(spec, training=data)
            assert caught.value.reason == reason
        assert f":{ROWS + 1}:1" in str(caught.value.where)
        report = await client.check_dataset(judge.spec, training=judge.training)
        assert (report.format, report.rows, report.longest) == ("labelled_image", ROWS, 17)
        with pytest.raises(InvalidInput) as caught:
            await client.generate("hello", base_model="tiny")
        assert caught.value.reason == "TASK_UNSUPPORTED"
        assert not await client.jobs()
