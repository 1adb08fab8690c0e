"""Classification and regression through a whole service: mixed, exact, measured and exported."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from cola_runtime.adapters.adapter_files import HEAD_FILE
from cola_runtime.errors import InvalidInput
from cola_runtime.jobs.plan import training_plan
from cola_runtime.rows import Row
from cola_runtime.spec import JobSpec
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
from cola_runtime.testing.sequence_reference import sequence_model, sequence_output
from cola_runtime.testing.tiny_models import save_tiny_model

STEPS = 12
WAIT_SECONDS = 60.0
NAMES = ("bad", "good")
WORDS = ("river", "stone", "amber", "cloud", "seven", "north", "glass", "paper", "quiet", "lemon")


def lines(number: int, task: dict[str, Any], *, pairs: bool) -> bytes:
    """Texts of 2 to 6 words; the label can be told from the first."""
    random = np.random.default_rng(number)
    records = []
    for _ in range(24):
        words = random.choice(WORDS, size=random.integers(2, 7)).tolist()
        place = WORDS.index(words[0])
        label = place / 10 if task["kind"] == "regression" else place % 2
        record = {"text": " ".join(words), "label": NAMES[label] if task.get("labels") == NAMES else label}
        records.append(record | ({"text_pair": words[-1]} if pairs else {}))
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def job(number: int, task: dict[str, Any], *, pairs: bool = False, **fields: Any) -> MixedJob:
    common = {"base_model": "tiny", "steps": STEPS, "rows_per_step": 4, "seed": number}
    common["adapter"] = {"rank": 2 + number, "alpha": 8}
    common["optimizer"] = {"learning_rate": 2e-3, "max_grad_norm": 1.0}
    spec = JobSpec.model_validate({"name": f"judge-{number}", "task": task, **common, **fields})
    return MixedJob(spec=spec, training=lines(number, task, pairs=pairs))


async def train_all(folder: Path, model: Path, jobs: list[MixedJob]) -> tuple[Any, dict[str, Any]]:
    """(base model, per job: exported folder, events)."""
    settings = service_for(folder / "service", model=model, name="tiny", dtype="float32", token_budget=2048)
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        done: dict[str, Any] = {}

        async def run(wanted: MixedJob) -> None:
            client = await stack.enter_async_context(await tenant_client(service, wanted.spec.name))
            handle = await client.submit(wanted.spec, training=wanted.training, evaluation=wanted.training)
            finished = await handle.wait(WAIT_SECONDS)
            exported = await handle.download_adapter(folder / wanted.spec.name)
            events = [event async for event in handle.events(follow=False)]
            done[wanted.spec.name] = {"folder": exported, "job": finished, "events": events}

        await asyncio.gather(*map(run, jobs))
        return service.base_model, done


def held_out(events: list[Any]) -> list[dict[str, Any]]:
    return [dict(event.data["metrics"]) for event in events if event.kind == "evaluation.done"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


async def test_tenants_of_an_encoder_end_as_on_transformers_classification_model(tmp_path: Path) -> None:
    model = save_tiny_model("bert", tmp_path / "model")
    jobs = [
        job(0, {"kind": "sequence_classification", "labels": NAMES}),
        job(1, {"kind": "sequence_classification", "labels": 5}, pairs=True, adaptation_interval=2, shards=2),
        job(2, {"kind": "regression"}, encoding="activations"),
        job(3, {"kind": "sequence_classification", "labels": 2}, adapter=[]),
    ]
    base, done = await train_all(tmp_path, model, jobs)
    for wanted in jobs:
        exported = exported_weights(done[wanted.spec.name]["folder"], base)
        alone = train_reference(wanted, base, model, attention="sdpa")
        assert largest_difference(exported, alone) <= 2e-5, wanted.spec.name
    before, after = held_out(done["judge-0"]["events"])
    assert before.keys() == {"loss", "accuracy", "f1", "f1_macro", "matthews"}
    assert after["loss"] == done["judge-0"]["job"].evaluation_loss_after < before["loss"]
    assert held_out(done["judge-2"]["events"])[1].keys() >= {"loss", "pearson", "spearman"}


async def test_a_causal_and_a_classification_job_train_side_by_side_on_a_decoder(tmp_path: Path) -> None:
    model = save_tiny_model("gpt2", tmp_path / "model")
    writer = four_tenants("tiny", steps=STEPS, encoding="auto")[0]
    judge = job(1, {"kind": "sequence_classification", "labels": NAMES})
    base, done = await train_all(tmp_path, model, [writer, judge])
    for wanted in (writer, judge):
        exported = exported_weights(done[wanted.spec.name]["folder"], base)
        alone = train_reference(wanted, base, model, attention="sdpa")
        assert largest_difference(exported, alone) <= 2e-5, wanted.spec.name
    assert held_out(done[writer.spec.name]["events"])[1].keys() >= {"loss", "perplexity"}


async def test_peft_and_the_head_file_give_the_adapters_logits(tmp_path: Path) -> None:
    model = save_tiny_model("bert", tmp_path / "model")
    wanted = job(0, {"kind": "sequence_classification", "labels": 3})
    base, done = await train_all(tmp_path, model, [wanted])
    folder = done["judge-0"]["folder"]
    stock = AutoModelForSequenceClassification.from_pretrained(model, num_labels=3).eval()
    head = safetensors.torch.load_file(folder / HEAD_FILE)
    stock.classifier.weight.data, stock.classifier.bias.data = head["score/weight"], head["score/bias"]
    loaded = PeftModel.from_pretrained(stock, folder).eval()

    spec = training_plan(wanted.spec, base, total_steps=STEPS).adapter
    ours, _ = sequence_model(model, spec, exported_weights(folder, base), dtype="float32")
    row = Row(tokens=np.arange(10, 20, dtype=np.int32), weights=np.empty(0, np.float32), label=0)
    found = loaded(input_ids=torch.arange(10, 20)[None]).logits
    torch.testing.assert_close(found, sequence_output(ours, [row]).logits)


async def test_what_an_encoder_does_not_serve_is_refused_and_nothing_is_created(tmp_path: Path) -> None:
    model = save_tiny_model("bert", tmp_path / "model")
    settings = service_for(tmp_path / "service", model=model, name="tiny", dtype="float32")
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        client = await stack.enter_async_context(await tenant_client(service, "alice"))
        writer = four_tenants("tiny", steps=STEPS, encoding="auto")[0]
        judge = job(1, {"kind": "sequence_classification", "labels": NAMES})
        spoilt = judge.training + b'{"text": "x", "label": "goood"}\n'
        for spec, data, reason in (
            (writer.spec, writer.training, "TASK_UNSUPPORTED"),
            (judge.spec, writer.training, "TASK_FORMAT"),
            (judge.spec, spoilt, "LABEL_UNKNOWN"),
        ):
            with pytest.raises(InvalidInput) as caught:
                await client.submit(spec, training=data)
            assert caught.value.reason == reason
        assert "25" in str(caught.value.where) and "did you mean 'good'" in str(caught.value)
        with pytest.raises(InvalidInput) as caught:
            await client.generate("hello", base_model="tiny")
        assert caught.value.reason == "TASK_UNSUPPORTED"
        assert not await client.jobs()
