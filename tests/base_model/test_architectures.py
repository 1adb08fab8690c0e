"""What must hold whatever the architecture: every kind's gradients out of one mixed batch are autograd's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cola_runtime.base_model.model import TappedModel
from cola_runtime.encodings import Encoding
from cola_runtime.errors import InvalidInput
from cola_runtime.testing.architectures import CAUSAL, save_causal_model
from tests.base_model.kind_samples import BOUNDS, assert_exact, mixed_kinds

# Bloom's softmax is in float32 whatever the model's type.
EAGER_ONLY = {"bloom": 1e-6, "gptj": BOUNDS["float64"]}


@pytest.mark.parametrize("model_type", sorted(CAUSAL))
def test_gradients_of_all_kinds_are_autograds(model_type: str, tmp_path: Path) -> None:
    path = save_causal_model(model_type, tmp_path, dtype="float64")
    attention = "eager" if model_type in EAGER_ONLY else "sdpa"
    tapped = TappedModel.load(path, dtype="float64", attention=attention)
    tenants, encodings = mixed_kinds(tapped.catalogue, Encoding.ADAPTER_GRADIENT, "float64")
    assert_exact(path, tapped, tenants, encodings, EAGER_ONLY.get(model_type, BOUNDS["float64"]))


def test_a_site_that_does_not_see_every_token_of_every_row_is_no_site(tmp_path: Path) -> None:
    """The experts of a mixture see the tokens that the router gives them, in any order."""
    mixture = {"num_key_value_heads": 2, "num_experts": 8, "moe_intermediate_size": 32}
    path = save_causal_model("qwen3_moe", tmp_path, dtype="float32", **mixture)
    tapped = TappedModel.load(path, dtype="float32", attention="eager")
    assert {site.name.rpartition(".")[2] for site in tapped.sites} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("gemma2", {"num_key_value_heads": 2, "head_dim": 16}), ("cohere", {"num_key_value_heads": 2})],
)
def test_a_model_that_bends_its_logits_is_refused(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    path = save_causal_model(model_type, tmp_path, dtype="float32", **changes)
    with pytest.raises(InvalidInput) as caught:
        TappedModel.load(path, dtype="float32", attention="eager")
    assert caught.value.reason == "BASE_MODEL_UNSUPPORTED"


def test_an_attention_that_the_architecture_does_not_have_is_refused(tmp_path: Path) -> None:
    path = save_causal_model("bloom", tmp_path, dtype="float32")
    with pytest.raises(InvalidInput) as caught:
        TappedModel.load(path, dtype="float32", attention="sdpa")
    assert caught.value.reason == "BASE_MODEL_UNSUPPORTED"
    assert TappedModel.load(path, dtype="float32", attention="auto").describe("", "").details["attention"]
