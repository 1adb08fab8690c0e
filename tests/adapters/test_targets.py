import re
from dataclasses import replace

import pytest

from cola_runtime.adapters.targets import resolve_target_sites
from cola_runtime.errors import InvalidInput
from cola_runtime.testing.tiny_models import tiny_sites
from cola_runtime.types import SiteKind


def names(kind, target_modules):
    return [site.name for site in resolve_target_sites(tiny_sites(kind), target_modules)]


def last_parts(kind, target_modules):
    return {re.split(r"\.\d+\.", name)[1] for name in names(kind, target_modules)}


@pytest.mark.parametrize(
    ("kind", "preset", "parts"),
    [
        ("llama", "attention", {f"self_attn.{p}_proj" for p in "qkvo"}),
        ("llama", "mlp", {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
        ("gpt2", "attention", {"attn.c_attn", "attn.c_proj"}),
        ("gpt2", "mlp", {"mlp.c_fc", "mlp.c_proj"}),
        (
            "bert",
            "attention",
            {*(f"attention.self.{p}" for p in ("query", "key", "value")), "attention.output.dense"},
        ),
        ("bert", "mlp", {"intermediate.dense", "output.dense"}),
    ],
)
def test_presets_follow_the_familys_names_in_every_layer(kind, preset, parts):
    assert last_parts(kind, preset) == parts
    assert len(names(kind, preset)) == 3 * len(parts)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta"])
def test_all_linear_is_the_catalogue_and_the_two_presets_divide_it(kind):
    everything = resolve_target_sites(tiny_sites(kind), "all-linear")
    assert everything == tiny_sites(kind)
    assert sorted(names(kind, "attention") + names(kind, "mlp")) == sorted(site.name for site in everything)


def test_names_match_as_in_peft_and_come_in_catalogue_order_once_each():
    chosen = names("llama", ("v_proj", "model.layers.1.self_attn.q_proj", "self_attn.v_proj"))
    assert chosen == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.2.self_attn.v_proj",
    ]


@pytest.mark.parametrize("name", ["proj", ".*q_proj", "q_pro", "layers", "model.layers.1"])
def test_part_of_a_word_a_pattern_or_a_parent_matches_nothing(name):
    with pytest.raises(InvalidInput) as caught:
        names("llama", (name,))
    assert caught.value.reason == "NO_MODULE_MATCHED"


def test_unmatched_names_are_all_reported_with_near_names():
    with pytest.raises(InvalidInput) as caught:
        names("llama", ("q_proj", "v_porj", "zzz"))
    error = caught.value
    assert error.where == "target_modules"
    assert [violation.message.split(";")[0] for violation in error.violations] == [
        "no module is named 'v_porj'",
        "no module is named 'zzz'",
    ]
    assert "near names: v_proj" in error.violations[0].message
    assert "all-linear" in error.remedy


def test_a_preset_that_fits_no_name_is_refused_and_so_is_an_empty_list():
    for targets in ("attention", ()):
        catalogue = [site for site in tiny_sites("llama") if "mlp" in site.name]
        with pytest.raises(InvalidInput) as caught:
            resolve_target_sites(catalogue, targets)
        assert caught.value.reason == "NO_MODULE_MATCHED"


def test_presets_name_neither_convolutions_nor_embeddings_which_names_do():
    linear = tiny_sites("llama")
    others = tuple(
        replace(linear[0], index=21 + number, name=name, kind=kind)
        for number, (name, kind) in enumerate(
            (("model.embed_tokens", SiteKind.EMBEDDING), ("vision.q_proj", SiteKind.CONV2D))
        )
    )
    catalogue = (*linear, *others)
    assert resolve_target_sites(catalogue, "all-linear") == linear
    assert resolve_target_sites(catalogue, "attention") == resolve_target_sites(linear, "attention")
    assert resolve_target_sites(catalogue, ["embed_tokens", "vision.q_proj"]) == others
