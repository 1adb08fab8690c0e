"""Encoder-decoders through a whole service: trained, measured, asked and exported as stock peft would."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from cola_runtime.adapters.attach import attach_adapter
from cola_runtime.spec import JobSpec
from cola_runtime.testing.exactness import (
    MixedJob,
    exported_weights,
    largest_difference,
    service_for,
    tenant_client,
    train_modules,
    train_reference,
)
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_encoder_decoders import save_tiny_encoder_decoder

STEPS = 5
NEW_TOKENS = 16
WAIT_SECONDS = 60.0
BOUND = 1e-12
WORDS = ("river", "stone", "amber", "cloud", "seven", "north", "glass", "paper", "quiet", "lemon")
TASK = {"kind": "sequence_to_sequence"}


def lines(number: int, count: int = 12) -> bytes:
    """Sources of one to five words, of other lengths than the targets."""
    records = []
    for row in range(count):
        words = [WORDS[(number + row * step) % len(WORDS)] for step in range(1, 2 + row % 5)]
        records.append({"prompt": " ".join(words), "completion": "ab " * (1 + row % 2) + words[0]})
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def job(number: int, **fields: Any) -> MixedJob:
    common: dict[str, Any] = {"base_model": "tiny", "steps": STEPS, "rows_per_step": 4, "seed": number}
    common["adapter"] = {"rank": 2 + number, "alpha": 8}
    common["optimizer"] = {"learning_rate": 2e-3, "max_grad_norm": 1.0}
    fields = {"name": f"writer-{number}", "task": TASK, **common, **fields}
    return MixedJob(spec=JobSpec.model_validate(fields), training=lines(number))


def stock_texts(model: Any, folder: Path, prompts: list[str]) -> list[str]:
    """What transformers' own greedy search writes, one prompt at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in prompts:
        source = tokenizer(prompt, return_tensors="pt")
        written = model.generate(
            input_ids=source.input_ids,
            attention_mask=source.attention_mask,
            max_new_tokens=NEW_TOKENS,
            num_beams=1,
            do_sample=False,
        )
        texts.append(tokenizer.decode(written[0], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("kind", ["t5", "bart"])
async def test_tenants_train_as_alone_with_stock_peft(kind: Any, tmp_path: Path) -> None:
    model = save_tiny_encoder_decoder(kind, tmp_path / "model", dtype="float64")
    attends = "EncDecAttention.k" if kind == "t5" else "encoder_attn.k_proj"
    jobs = [
        job(0),
        job(1, adaptation_interval=2, encoding="activations", adapter={"target_modules": "attention"}),
        job(2, encoding="weight_gradient", adapter={"kind": "linear", "target_modules": [attends]}),
        job(3, adapter={"kind": "mlp", "hidden": 4, "target_modules": "mlp"}),
    ]
    settings = service_for(
        tmp_path / "service", model=model, name="tiny", dtype="float64", attention="auto", token_budget=512
    )
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        client = await stack.enter_async_context(await tenant_client(service, "alice"))

        async def exported(wanted: MixedJob) -> Path:
            measured = wanted.training[: wanted.training.index(b"\n", 200) + 1]
            handle = await client.submit(wanted.spec, training=wanted.training, evaluation=measured)
            await handle.wait(WAIT_SECONDS)
            return await handle.download_adapter(tmp_path / wanted.spec.name)

        folders = await asyncio.gather(*map(exported, jobs))
        prompts = ["river stone", "north"]
        first = await client.job("writer-0")
        told = [(await first.generate(prompt, max_new_tokens=NEW_TOKENS)).text for prompt in prompts]
    base = service.base_model
    attention = base.details["attention"]
    for wanted, folder in zip(jobs, folders, strict=True):
        alone = train_reference if wanted.spec.adapter_parts[0].kind == "lora" else train_modules
        expected = alone(wanted, base, model, attention=attention)
        assert largest_difference(exported_weights(folder, base), expected) <= BOUND, wanted.spec.name

    stock = AutoModelForSeq2SeqLM.from_pretrained(model, dtype=torch.float64).eval()
    attached = attach_adapter(stock, folders[0])
    assert stock_texts(stock, model, prompts) == told
    attached.detach()
    bare = stock_texts(stock, model, prompts)
    loaded = PeftModel.from_pretrained(stock, folders[0]).eval()
    assert loaded.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    assert stock_texts(loaded, model, prompts) == told != bare
