"""Generation equals transformers' and peft's, with a key-value cache and the adapter active."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from cola_runtime.base_model.model import TappedModel
from cola_runtime.errors import InvalidInput
from cola_runtime.testing.peft_reference import adapter_parameters, peft_model
from tests.base_model.conftest import TinyFolder
from tests.base_model.mixed_samples import Tenant, four_tenants, install_all

PROMPT = [40, 41, 42, 90, 91]
KINDS = ["llama", "gpt2"]


def greedy(model: Any, tokens: int) -> list[int]:
    model.get_base_model().generation_config.eos_token_id = None
    output = model.generate(
        input_ids=torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
        max_new_tokens=tokens,
        do_sample=False,
    )
    return [int(token) for token in output[0, len(PROMPT) :]]


def with_peft(path: Any, member: Tenant) -> Any:
    model = peft_model(path, member.spec, dtype="float32")
    with torch.no_grad():
        for key, parameter in adapter_parameters(model, member.spec).items():
            parameter.copy_(member.weights[key])
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_equal_pefts_and_without_adapter_transformers(
    tiny_folder: TinyFolder, kind: str
) -> None:
    path = tiny_folder(kind, "float32")
    model = TappedModel.load(path, dtype="float32", threads=1)
    member = four_tenants(model.sites, "float32")[0]
    install_all(model, [member])
    reference = with_peft(path, member)
    adapted = model.generate(member.job_id, [PROMPT], max_new_tokens=12)[0]
    assert adapted == greedy(reference, 12)
    with reference.disable_adapter():
        plain = greedy(reference, 12)
    assert model.generate(None, [PROMPT], max_new_tokens=12) == [plain]
    assert adapted != plain


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_repeats_with_its_seed_and_stops_before_a_stop_token(
    tiny_folder: TinyFolder, kind: str
) -> None:
    model = TappedModel.load(tiny_folder(kind, "float32"), dtype="float32", threads=1)
    options = {"max_new_tokens": 10, "temperature": 1.5}
    [first] = model.generate(None, [PROMPT], seed=1, **options)
    assert model.generate(None, [PROMPT], seed=1, **options) == [first]
    assert model.generate(None, [PROMPT], seed=2, **options) != [first]
    cut = first.index(first[5])
    assert model.generate(None, [PROMPT], seed=1, stop_ids={first[5]}, **options) == [first[:cut]]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_several_lengths_are_continued_as_each_alone(tiny_folder: TinyFolder, kind: str) -> None:
    model = TappedModel.load(tiny_folder(kind, "float64"), dtype="float64", threads=1)
    member = four_tenants(model.sites, "float64")[0]
    install_all(model, [member])
    prompts = [PROMPT, PROMPT[:1], [9] * 11]
    alone = [model.generate(member.job_id, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert model.generate(member.job_id, prompts, max_new_tokens=12) == alone
    stop = alone[0][3]
    cut = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in alone]
    assert model.generate(member.job_id, prompts, max_new_tokens=12, stop_ids=[stop]) == cut


def test_a_decoder_is_asked_without_its_folders_own_settings(tiny_folder: TinyFolder) -> None:
    path = tiny_folder("llama", "float32")
    bare = TappedModel.load(path, dtype="float32", threads=1).generate(None, [PROMPT], max_new_tokens=8)
    settings = GenerationConfig(repetition_penalty=1.9, num_beams=2, max_length=6, do_sample=True)
    settings.save_pretrained(path)
    assert (
        TappedModel.load(path, dtype="float32", threads=1).generate(None, [PROMPT], max_new_tokens=8) == bare
    )


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused(tiny_folder: TinyFolder) -> None:
    model = TappedModel.load(tiny_folder("gpt2", "float32"), dtype="float32", threads=1)
    context = model._loaded.context_length
    room = context - len(PROMPT)
    with pytest.raises(InvalidInput) as caught:
        model.generate(None, [PROMPT], max_new_tokens=room + 1)
    assert (caught.value.reason, caught.value.limit) == ("SEQUENCE_TOO_LONG", str(context))
