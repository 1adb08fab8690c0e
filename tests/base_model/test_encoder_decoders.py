"""Encoder-decoders: gradients of mixed batches against autograd, and generation against transformers' own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSeq2SeqLM, GenerationConfig

from cola_runtime.adapter_spec import AdapterPart, AdapterSpec, LoraKind
from cola_runtime.adapters.dropout import SegmentDropout
from cola_runtime.adapters.targets import resolve_target_sites
from cola_runtime.base_model.model import TappedModel
from cola_runtime.encodings import Encoding
from cola_runtime.errors import InvalidInput
from cola_runtime.job_choices import Task
from cola_runtime.rows import Row
from cola_runtime.testing.architectures import SEQUENCE_TO_SEQUENCE, save_encoder_decoder
from cola_runtime.testing.ordinary_modules import OrdinaryAdapter, add_adapter
from cola_runtime.testing.peft_reference import relative_difference
from cola_runtime.types import Site
from tests.base_model.kind_samples import BOUNDS, mixed_kinds
from tests.base_model.mixed_samples import (
    Tenant,
    Weights,
    gradients_of,
    install_all,
    random_row,
    run_segments,
    trained_weights,
)

# T5's layer norm is in float32 whatever the model's type, in the reference as in ours; only padding differs.
MODELS = sorted(SEQUENCE_TO_SEQUENCE)


def with_sources(member: Tenant) -> Tenant:
    """Sources of other lengths than the targets, so that both are padded."""
    draw = np.random.default_rng(member.spec.seed)
    rows = tuple(
        replace(row, source=draw.integers(5, 250, 3 + 7 * number + len(row.tokens) % 5, dtype=np.int32))
        for number, row in enumerate(member.rows)
    )
    return replace(member, rows=rows)


def autograd_gradients(path: Path, member: Tenant, attention: str) -> tuple[Weights, float]:
    """The stock model, row by row and so without padding, with the adapter as ordinary modules."""
    model = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float64, attn_implementation=attention)
    parameters = add_adapter(model.requires_grad_(False).eval(), member.spec, member.weights)
    loss = sum(row_loss(model, row) for row in member.rows)
    loss = loss / float(sum(row.weights.sum(dtype=np.float64) for row in member.rows))
    loss.backward()
    return {
        key.gradient: torch.zeros_like(p) if p.grad is None else p.grad for key, p in parameters.items()
    }, float(loss.detach())


def row_loss(model, row: Row) -> torch.Tensor:
    tokens, source = (torch.from_numpy(part).long()[None] for part in (row.tokens, row.source))
    logits = model(input_ids=source, decoder_input_ids=tokens, use_cache=False).logits
    losses = cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
    return (torch.from_numpy(row.weights[1:]).double() * losses).sum()


@pytest.mark.parametrize(
    ("model_type", "encoding"),
    [
        *((model_type, Encoding.ADAPTER_GRADIENT) for model_type in MODELS),
        ("t5", Encoding.ACTIVATIONS),
        ("bart", Encoding.WEIGHT_GRADIENT),
    ],
)
def test_gradients_of_all_kinds_are_autograds(model_type: str, encoding: Encoding, tmp_path: Path) -> None:
    path = save_encoder_decoder(model_type, tmp_path, dtype="float64")
    tapped = TappedModel.load(path, dtype="float64")
    attention = tapped.describe("", "").details["attention"]
    tenants, encodings = mixed_kinds(tapped.catalogue, encoding, "float64")
    tenants = [with_sources(member) for member in tenants]
    install_all(tapped, tenants)
    result, taps = run_segments(
        tapped, [member.segment(e) for member, e in zip(tenants, encodings, strict=True)]
    )
    for position, member in enumerate(tenants):
        expected, loss = autograd_gradients(path, member, attention)
        assert result.losses[position].loss_sum / result.losses[position].weight_sum == pytest.approx(
            loss, rel=1e-10
        )
        floor = 1e-7 * max(float(gradient.norm()) for gradient in expected.values())
        differences = relative_difference(gradients_of(taps, position, member), expected)
        differences = {key: d for key, d in differences.items() if float(expected[key].norm()) > floor}
        assert max(differences.values()) < BOUNDS["float64"]


@pytest.mark.parametrize("model_type", MODELS)
def test_the_presets_name_every_site_once(model_type: str, tmp_path: Path) -> None:
    sites = TappedModel.load(
        save_encoder_decoder(model_type, tmp_path, dtype="float32"), dtype="float32"
    ).sites
    found = [site for preset in ("attention", "mlp") for site in resolve_target_sites(sites, preset)]
    assert sorted(found, key=lambda site: site.index) == list(sites)
    across = resolve_target_sites(
        sites, ["EncDecAttention.v" if "t5" in model_type else "encoder_attn.v_proj"]
    )
    assert len(across) == 2


def test_it_serves_sequence_to_sequence_only_and_refuses_rows_without_a_source(tmp_path: Path) -> None:
    tapped = TappedModel.load(save_encoder_decoder("t5", tmp_path, dtype="float32"), dtype="float32")
    assert tapped.describe("", "").tasks == (Task.SEQUENCE_TO_SEQUENCE,)
    tenants, _ = mixed_kinds(tapped.catalogue, Encoding.ADAPTER_GRADIENT, "float32")
    install_all(tapped, tenants[:2])
    result, _ = run_segments(tapped, [tenants[0].segment(), with_sources(tenants[1]).segment()])
    assert [loss.reason for loss in result.losses] == ["ROW_INVALID", None]


@pytest.mark.parametrize("model_type", MODELS)
def test_greedy_generation_is_transformers_own(model_type: str, tmp_path: Path) -> None:
    path = save_encoder_decoder(model_type, tmp_path, dtype="float64")
    tapped = TappedModel.load(path, dtype="float64")
    source = [int(token) for token in random_row(14, seed=4).tokens]
    model = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float64)
    expected = model.generate(
        input_ids=torch.tensor([source]), max_new_tokens=12, do_sample=False, num_beams=1, eos_token_id=None
    )
    assert tapped.generate(None, [source], max_new_tokens=12) == [expected[0, 1:].tolist()]


def of_source(site: Site) -> bool:
    """The encoder's own sites, and k and v of the attention from decoder to encoder."""
    across = ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj", "encoder_attn.v_proj")
    return "decoder." not in site.name or site.name.endswith(across)


def masked_gradients(path: Path, member: Tenant, attention: str) -> Weights:
    """`autograd_gradients` of LoRA whose inputs are masked as each row, alone, says."""
    model = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float64, attn_implementation=attention)
    model.requires_grad_(False).eval()
    current: list[int] = []
    parameters = {}
    for site in member.spec.sites:
        adapter = OrdinaryAdapter(member.spec.kinds[site.index], site, member.weights)

        def add(_module, args, output, adapter=adapter, site=site):
            row = member.rows[current[0]]
            lengths = (len(row.source if of_source(site) else row.tokens),)
            kind = member.spec.kinds[site.index]
            draw = SegmentDropout(
                dropout=kind.dropout, seed=member.spec.seed, version=0, rows=(current[0],), lengths=lengths
            )
            mask = draw.mask(site, lengths[0]).view(1, lengths[0], -1).double() * draw.factor
            return output + adapter((args[0] * mask).view(args[0].shape))

        model.get_submodule(site.name).register_forward_hook(add)
        parameters.update(adapter.named)
    total = sum(row.weights.sum(dtype=np.float64) for row in member.rows)
    for number, row in enumerate(member.rows):
        current[:] = [number]
        (row_loss(model, row) / float(total)).backward()
    return {key.gradient: p.grad for key, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_dropout_masks_the_tokens_that_each_site_sees(model_type: str, tmp_path: Path) -> None:
    path = save_encoder_decoder(model_type, tmp_path, dtype="float64")
    tapped = TappedModel.load(path, dtype="float64")
    tenants = []
    for number, dropout in enumerate((0.3, 0.6)):
        kind = LoraKind(rank=2 + number, dropout=dropout)
        spec = AdapterSpec(parts=(AdapterPart(kind=kind, sites=tapped.sites),), seed=number, dtype="float64")
        rows = tuple(random_row(length, seed=10 * number + length) for length in (9, 4 + number))
        tenants.append(
            with_sources(Tenant(job_id=f"job-{number}", spec=spec, weights=trained_weights(spec), rows=rows))
        )
    install_all(tapped, tenants)
    _, taps = run_segments(tapped, [member.segment() for member in tenants])
    attention = tapped.describe("", "").details["attention"]
    for position, member in enumerate(tenants):
        expected = masked_gradients(path, member, attention)
        found = gradients_of(taps, position, member)
        assert max(relative_difference({key: found[key] for key in expected}, expected).values()) < 1e-9


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_prompts_of_several_lengths_are_answered_as_each_alone_under_the_folders_own_settings(
    model_type: str, tmp_path: Path
) -> None:
    path = save_encoder_decoder(model_type, tmp_path, dtype="float64")
    settings = GenerationConfig.from_pretrained(path)
    settings.update(no_repeat_ngram_size=2, forced_eos_token_id=9, bad_words_ids=[[5], [6]], num_beams=4)
    settings.update(forced_bos_token_id=11, early_stopping=True, length_penalty=0.5)
    settings.save_pretrained(path)
    tapped = TappedModel.load(path, dtype="float64")
    sources = [random_row(length, seed=length).tokens.tolist() for length in (14, 3, 8)]
    model = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float64)
    answers = tapped.generate(None, sources, max_new_tokens=12, stop_ids=[2])
    for source, answer in zip(sources, answers, strict=True):
        written = model.generate(
            input_ids=torch.tensor([source]),
            max_new_tokens=12,
            num_beams=1,
            do_sample=False,
            early_stopping=False,
            length_penalty=1.0,
            eos_token_id=2,
        )
        assert answer == written[0, 1:].tolist() and answer[-1] == 9
    drawn = [
        tapped.generate(None, sources, max_new_tokens=6, temperature=2.0, seed=seed) for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_folder_that_names_no_decoder_start_is_refused(tmp_path: Path) -> None:
    path = save_encoder_decoder("bart", tmp_path, dtype="float32")
    for file in ("config.json", "generation_config.json"):
        fields = json.loads((path / file).read_text())
        (path / file).write_text(json.dumps({**fields, "decoder_start_token_id": None}))
    with pytest.raises(InvalidInput) as caught:
        TappedModel.load(path, dtype="float32")
    assert caught.value.reason == "BASE_MODEL_UNSUPPORTED"
