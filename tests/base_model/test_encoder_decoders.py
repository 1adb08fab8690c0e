"""Encoder-decoders: gradients of mixed batches against autograd, and generation against transformers' own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSeq2SeqLM

from cola_runtime.base_model.model import TappedModel
from cola_runtime.testing.architectures import SEQUENCE_TO_SEQUENCE, save_encoder_decoder
from cola_runtime.testing.ordinary_modules import add_adapter
from cola_runtime.testing.peft_reference import relative_difference
from cola_runtime.types import Encoding, Row, Task
from tests.base_model.kind_samples import BOUNDS, mixed_kinds
from tests.base_model.mixed_samples import (
    Tenant,
    Weights,
    gradients_of,
    install_all,
    random_row,
    run_segments,
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
