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
from transformers.models.t5.modeling_t5 import T5LayerNorm

from cola_runtime.adapters.attach import attach_adapter
from cola_runtime.base_model.model import TappedModel
from cola_runtime.data.rouge import rouge_l
from cola_runtime.errors import InvalidInput
from cola_runtime.spec import JobSpec
from cola_runtime.spec_parsing import parse_job_spec
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
from cola_runtime.testing.tiny_models import save_tiny_model

STEPS = 5
NEW_TOKENS = 16
WAIT_SECONDS = 60.0
BOUND = 1e-10
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


@pytest.fixture
def wide_t5_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """T5's norms in the model's own dtype on both sides: stock ones take the mean square in float32, whose
    rounding turns a difference in a double's last digit into one of 4e-10 of an adapter.
    """

    def forward(norm: Any, hidden: torch.Tensor) -> Any:
        inverse = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        return norm.weight * (hidden * inverse)

    monkeypatch.setattr(T5LayerNorm, "forward", forward)


@pytest.mark.usefixtures("wide_t5_norms")
@pytest.mark.parametrize("kind", ["t5", "bart"])
async def test_tenants_train_as_alone_with_stock_peft(kind: Any, tmp_path: Path) -> None:
    model = save_tiny_encoder_decoder(kind, tmp_path / "model", dtype="float64")
    attends = "EncDecAttention.k" if kind == "t5" else "encoder_attn.k_proj"
    jobs = [
        job(0, optimizer={"learning_rate": 3e-2}),
        job(1, adaptation_interval=2, encoding="activations", adapter={"target_modules": "attention"}),
        job(2, encoding="weight_gradient", adapter={"kind": "linear", "target_modules": [attends]}),
        job(3, adapter={"kind": "mlp", "hidden": 4, "target_modules": "mlp"}),
        job(4, adapter={"kind": "linear", "target_modules": "attention"}, mode="merged"),
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


def rouge_of(model: Any, folder: Path, data: bytes) -> float:
    """The mean over the records, by the stock model alone."""
    records = [json.loads(line) for line in data.splitlines()]
    written = stock_texts(model, folder, [record["prompt"] for record in records])
    scores = [rouge_l(record["completion"], text) for record, text in zip(records, written, strict=True)]
    return sum(scores) / len(scores)


async def test_held_out_prompts_are_answered_in_parts_and_the_best_rouge_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[int] = []
    generate = TappedModel.generate

    def noting(tapped: TappedModel, job_id: Any, prompts: Any, **options: Any) -> Any:
        parts.append(len(prompts))
        return generate(tapped, job_id, prompts, **options)

    monkeypatch.setattr(TappedModel, "generate", noting)
    model = save_tiny_encoder_decoder("bart", tmp_path / "model")
    evaluation = {"every": 10, "metric": "rouge_l", "max_new_tokens": NEW_TOKENS}
    fast = {"learning_rate": 1e-2}
    wanted = job(0, steps=20, rows_per_step=4, optimizer=fast, evaluation=evaluation)
    data = b"".join(b'{"prompt": "%s", "completion": "ab ab"}\n' % word.encode() for word in WORDS[:4])
    settings = service_for(
        tmp_path / "service", model=model, name="tiny", dtype="float32", attention="auto", token_budget=64
    )
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        client = await stack.enter_async_context(await tenant_client(service, "alice"))
        handle = await client.submit(wanted.spec, training=data, evaluation=data)
        await handle.wait(WAIT_SECONDS)
        found = await handle.evaluations()
        folder = await handle.download_adapter(tmp_path / "best", version="best")
    assert parts == [2, 2] * len(found), "two prompts of 7 tokens and 16 new ones each fill 64 tokens"
    assert all(each.metrics.keys() == {"loss", "perplexity", "rouge_l"} for each in found)
    scores = {each.step: each.metrics["rouge_l"] for each in found}
    [best] = [each.step for each in found if each.best]
    assert scores[best] == max(scores.values()) > scores[0]
    stock = AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    assert rouge_of(stock, model, data) == pytest.approx(scores[0], abs=1e-12)
    loaded = PeftModel.from_pretrained(stock, folder).eval()
    assert rouge_of(loaded, model, data) == pytest.approx(scores[best], abs=1e-12)


async def test_a_chat_models_last_turns_are_written_and_compared(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    turns = [[("user", word), ("assistant", f"ab {word}")] for word in WORDS[:3]]
    turns[1] += [("user", "and?"), ("assistant", "ab ab")]
    chats = [[{"role": role, "content": text} for role, text in chat] for chat in turns]
    data = b"".join(json.dumps({"messages": chat}).encode() + b"\n" for chat in chats)
    evaluation = {"metric": "rouge_l", "max_new_tokens": NEW_TOKENS}
    wanted = job(
        0, task={"kind": "causal_lm"}, steps=8, optimizer={"learning_rate": 2e-2}, evaluation=evaluation
    )
    settings = service_for(tmp_path / "service", model=model, name="tiny", dtype="float32")
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        client = await stack.enter_async_context(await tenant_client(service, "alice"))
        handle = await client.submit(wanted.spec, training=data, evaluation=data)
        await handle.wait(WAIT_SECONDS)
        last = (await handle.evaluations())[-1].metrics["rouge_l"]
        scores = []
        for chat in chats:
            told = await handle.generate(chat[:-1], max_new_tokens=NEW_TOKENS)
            scores.append(rouge_l(chat[-1]["content"], told.text))
    assert last == pytest.approx(sum(scores) / len(scores), abs=1e-12)
    assert last > 0


async def test_what_an_encoder_decoder_does_not_serve_is_refused(tmp_path: Path) -> None:
    model = save_tiny_encoder_decoder("t5", tmp_path / "model")
    settings = service_for(tmp_path / "service", model=model, name="tiny", dtype="float32", attention="auto")
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        client = await stack.enter_async_context(await tenant_client(service, "alice"))
        pairs = lines(0)
        chat = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
        long = pairs + b'{"prompt": "a", "completion": "' + b"b" * 60 + b'"}\n'
        for fields, data, reason, told in (
            ({"task": {"kind": "causal_lm"}}, pairs, "TASK_UNSUPPORTED", "sequence_to_sequence"),
            ({}, chat, "TASK_FORMAT", "these are chat records"),
            ({}, b'{"text": "a"}\n', "TASK_FORMAT", "the encoder reads the prompt"),
            ({"max_length": 61}, long, "ROW_TOO_LONG", "the completion has 62 tokens, 61 tokens fit"),
            ({"evaluation": {"metric": "rouge_l", "max_new_tokens": 256}, "max_length": 62}, long, None, ""),
            ({"evaluation": {"metric": "rouge_l"}}, None, "EVALUATION_NEEDS_DATA", "held-out"),
            ({"loss": "full"}, pairs, "SPEC_INVALID", "loss full"),
            ({"evaluation": {"max_new_tokens": 4}}, pairs, "SPEC_INVALID", "goes with metric rouge_l"),
        ):
            spec = {**job(0).spec.model_dump(mode="json"), **fields}
            if reason is None:
                await client.check_dataset(JobSpec.model_validate(spec), training=data, evaluation=data)
                continue
            with pytest.raises(InvalidInput) as caught:
                await client.submit(parse_job_spec(spec), training=data or pairs, evaluation=data)
            assert caught.value.reason == reason and told in str(caught.value)
            assert reason != "ROW_TOO_LONG" or "13" in str(caught.value.where)
        with pytest.raises(InvalidInput) as caught:
            await client.generate([{"role": "user", "content": "hello"}], base_model="tiny")
        assert caught.value.reason == "TEMPLATE_MISSING"
        assert not await client.jobs()


async def test_a_decoder_is_not_trained_from_sequence_to_sequence(tmp_path: Path) -> None:
    model = save_tiny_model("gpt2", tmp_path / "model")
    settings = service_for(tmp_path / "service", model=model, name="tiny", dtype="float32")
    async with running_in_process(settings) as (service, _), AsyncExitStack() as stack:
        client = await stack.enter_async_context(await tenant_client(service, "alice"))
        with pytest.raises(InvalidInput) as caught:
            await client.submit(job(0).spec, training=lines(0))
        assert caught.value.reason == "TASK_UNSUPPORTED"
        rouge = job(0, task={"kind": "causal_lm"}, evaluation={"metric": "rouge_l", "max_new_tokens": 200})
        for data, reason in (
            (b'{"text": "a"}\n', "METRIC_UNSUPPORTED"),
            (lines(0) + b'{"prompt": "' + b"a" * 60 + b'", "completion": "b"}\n', "PROMPT_TOO_LONG"),
        ):
            with pytest.raises(InvalidInput) as caught:
                await client.submit(rouge.spec, training=lines(0), evaluation=data)
            assert caught.value.reason == reason
        assert "evaluation.jsonl:13" in str(caught.value.where)
