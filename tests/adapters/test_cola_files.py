"""A cola folder is read back exactly, and refused with the place where it is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from cola_runtime.adapter_spec import MlpKind
from cola_runtime.adapters.adapter_files import adapter_folder, read_adapter_folder
from cola_runtime.adapters.folder_files import CONFIG_FILE, WEIGHTS_FILE
from cola_runtime.errors import InvalidInput
from cola_runtime.testing.tiny_models import tiny_sites
from tests.adapters.adapter_samples import KINDS, LORA, spec_of, trained_weights

SITES = tiny_sites("llama")
Files = dict[str, bytes]


def files_of(dtype: str = "float64") -> Files:
    spec = spec_of((LORA, SITES[:2]), (MlpKind(hidden=4), SITES[2:4]), dtype=dtype)
    return adapter_folder(spec, trained_weights(spec), "base")


def changed_config(change: Callable[[dict[str, Any]], None]) -> Files:
    files = files_of()
    config = json.loads(files[CONFIG_FILE])
    change(config)
    return {**files, CONFIG_FILE: json.dumps(config).encode()}


def changed_tensors(change: Callable[[dict[str, Any]], None], dtype: str = "float64") -> Files:
    files = files_of(dtype)
    tensors = safetensors.numpy.load(files[WEIGHTS_FILE])
    change(tensors)
    return {**files, WEIGHTS_FILE: safetensors.numpy.save(tensors)}


@pytest.mark.usefixtures("bent_is_registered")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith(("linearized", "rslora"))])
def test_reading_gives_back_what_was_written(name: str, dtype: str) -> None:
    spec = spec_of((KINDS[name], SITES[1::2]), (MlpKind(hidden=2), SITES[::2]), dtype=dtype)
    weights = trained_weights(spec)
    files = adapter_folder(spec, weights, "base")
    found = read_adapter_folder(files, SITES)
    assert (found.spec, found.base_model) == (spec, "base")
    assert found.weights.keys() == weights.keys()
    for key, weight in weights.items():
        assert found.weights[key].dtype == weight.dtype
        np.testing.assert_array_equal(found.weights[key], weight)


def test_sites_are_found_by_name_however_they_are_numbered() -> None:
    renumbered = tuple(replace(site, index=site.index + 5, input_group=site.index) for site in SITES)
    found = read_adapter_folder(files_of(), renumbered)
    assert found.spec.sites == renumbered[:4]
    assert {key.site for key in found.weights} == {5, 6, 7, 8}


def test_the_config_never_looks_like_pefts() -> None:
    config = json.loads(files_of()[CONFIG_FILE])
    assert "peft_type" not in config
    assert (config["format"], config["version"]) == ("cola_adapter", 1)
    assert config["base_model_name_or_path"] == "base"


MLP_IN = "model.layers.0.self_attn.v_proj/mlp_in"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "adapter_config.json is missing"),
        ({CONFIG_FILE: b"[" * 100_000}, "is not JSON"),
        ({CONFIG_FILE: b"{}"}, "says neither a peft_type nor format cola_adapter"),
        (changed_config(lambda c: c.update(version=2)), "does not say format cola_adapter of version 1"),
        (changed_config(lambda c: c.pop("adapter")), "describes no adapter"),
        (changed_config(lambda c: c["adapter"]["parts"][1]["kind"].update(hidden=0)), "mlp.hidden"),
        (
            changed_config(lambda c: c["adapter"]["parts"][0]["sites"][0].update(name="q")),
            "site 'q', which the base model does not have",
        ),
        (
            changed_config(lambda c: c["adapter"]["parts"][0]["sites"][0].update(in_features=63)),
            "expects site 'model.layers.0.self_attn.q_proj' to be linear 63 -> 64, the base model's is "
            "linear 64 -> 64",
        ),
        (
            changed_config(
                lambda c: c["adapter"]["parts"][0]["sites"][1].update(
                    name="model.layers.0.self_attn.q_proj", out_features=64
                )
            ),
            "names a site twice",
        ),
        ({CONFIG_FILE: files_of()[CONFIG_FILE]}, "adapter_model.safetensors is missing"),
        ({**files_of(), WEIGHTS_FILE: b"no"}, "is not safetensors"),
        (changed_tensors(lambda t: t.clear()), "holds no tensors"),
        (changed_tensors(lambda t: t.pop(MLP_IN)), f"tensor '{MLP_IN}' is missing"),
        (changed_tensors(lambda t: t.update(extra=np.ones(2))), "'extra' belongs to no weight"),
        (changed_tensors(lambda t: t.update({MLP_IN: np.ones((64, 4))})), "expects shape (4, 64)"),
        (changed_tensors(lambda t: t[MLP_IN].__setitem__((1, 2), np.nan)), "not finite"),
        (
            changed_tensors(lambda t: t.update({MLP_IN: np.ones((4, 64))}), dtype="float32"),
            f"'{MLP_IN}' expects float32, got float64",
        ),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused_with_the_place(files: Files, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_adapter_folder(files, SITES)
    assert caught.value.reason == "ADAPTER_FILE_INVALID"
    assert caught.value.where in (CONFIG_FILE, WEIGHTS_FILE)
    assert message in str(caught.value)
