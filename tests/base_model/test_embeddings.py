"""What is particular to embeddings: padding that never trains, generation, and which of them are no sites."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from cola_runtime.adapters.site_modules import site_kind
from cola_runtime.base_model.model import TappedModel
from cola_runtime.encodings import Encoding
from cola_runtime.testing.architectures import save_causal_model, save_encoder_decoder
from cola_runtime.testing.ordinary_modules import add_adapter, wide_norms
from cola_runtime.types import Site, SiteKind, TensorKind
from tests.base_model.conftest import TinyFolder
from tests.base_model.kind_samples import BOUNDS, KINDS, NONLINEAR, assert_exact, everywhere
from tests.base_model.mixed_samples import Tenant, install_all, run_segments

LINEAR = [name for name in KINDS if name not in NONLINEAR]
PADDING = 7


def embeddings_of(tapped: TappedModel) -> tuple[Site, ...]:
    return tuple(site for site in tapped.catalogue if site.kind is SiteKind.EMBEDDING)


def with_padding(member: Tenant) -> Tenant:
    """Every fourth token is the padding's id, as a chat's end of turn may be."""
    rows = []
    for row in member.rows:
        tokens = row.tokens.copy()
        tokens[1::4] = PADDING
        rows.append(replace(row, tokens=tokens))
    return replace(member, rows=tuple(rows))


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_the_paddings_own_numbers_never_train_as_in_torch(
    model_type: str, encoding: Encoding, tmp_path: Path
) -> None:
    path = save_causal_model(model_type, tmp_path, dtype="float64", pad_token_id=PADDING)
    tapped = TappedModel.load(path, dtype="float64", attention="sdpa")
    assert tapped.describe("", "").details["body"] == (
        "LlamaBody" if model_type == "llama" else "PatchedBody"
    )
    (site,) = embeddings_of(tapped)
    assert site.padding_index == PADDING
    tenants = [with_padding(everywhere(n, KINDS[k], (site,), "float64")) for n, k in enumerate(LINEAR)]
    assert_exact(path, tapped, tenants, [encoding] * len(tenants), BOUNDS["float64"])
    install_all(tapped, tenants)
    _, taps = run_segments(tapped, [member.segment() for member in tenants])
    over_ids = (TensorKind.GRAD_LORA_A, TensorKind.GRAD_DELTA_A, TensorKind.GRAD_WEIGHT)
    found = [tensor for tap in taps for key, tensor in tap.tensors.items() if key.kind in over_ids]
    assert found
    assert not any(tensor[:, PADDING].any() for tensor in found)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_generation_continues_with_the_embeddings_adapter(tiny_folder: TinyFolder, model: str) -> None:
    path = tiny_folder(model, "float64")
    tapped = TappedModel.load(path, dtype="float64", attention="sdpa")
    member = everywhere(0, KINDS["lora"], embeddings_of(tapped), "float64")
    install_all(tapped, [member])
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="sdpa")
    wide_norms(stock)
    add_adapter(stock, member.spec, member.weights)
    prompt = [int(token) for token in member.rows[0].tokens]
    expected = stock.generate(
        torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert tapped.generate(member.job_id, [prompt], max_new_tokens=8) == [expected[0, len(prompt) :].tolist()]


def test_activations_of_an_embedding_are_ids(tiny_folder: TinyFolder) -> None:
    tapped = TappedModel.load(tiny_folder("llama", "float32"), dtype="float32", attention="sdpa")
    member = everywhere(1, KINDS["lora"], embeddings_of(tapped), "float32")
    install_all(tapped, [member])
    _, (tap,) = run_segments(tapped, [member.segment(Encoding.ACTIVATIONS)])
    ids, grads = tap.tensors.values()
    assert (ids.dtype, ids.shape) == (torch.int32, (len(grads), 1))
    assert np.isin(ids.numpy(), member.rows[0].tokens).all()


def test_an_embedding_that_is_not_looked_up_token_by_token_as_it_is_is_no_site(tmp_path: Path) -> None:
    """BART scales its embedding in a class of its own and counts positions from 2."""
    tapped = TappedModel.load(save_encoder_decoder("bart", tmp_path, dtype="float32"), dtype="float32")
    assert embeddings_of(tapped) == ()
    assert site_kind(nn.Embedding(3, 4)) is SiteKind.EMBEDDING
    assert site_kind(nn.Embedding(3, 4, max_norm=1.0)) is None
    assert site_kind(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))) is None
