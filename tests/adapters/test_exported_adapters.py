"""Whatever is exported computes outside the service what it computed in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save
from transformers import AutoModelForCausalLM

from cola_runtime.adapter_spec import AdapterSpec, LinearizedLoraKind, LoraKind
from cola_runtime.adapters import module_registry
from cola_runtime.adapters.adapter_files import adapter_folder
from cola_runtime.adapters.attach import attach_adapter
from cola_runtime.adapters.folder_files import CONFIG_FILE, WEIGHTS_FILE
from cola_runtime.adapters.peft_files import read_peft_folder
from cola_runtime.base_model.model import TappedModel
from cola_runtime.errors import InvalidInput
from cola_runtime.rows import Row
from cola_runtime.testing.ordinary_modules import wide_norms
from cola_runtime.testing.tiny_models import ModelKind, save_tiny_model, tiny_sites
from cola_runtime.types import BaseStep, Lease, Segment, Site, TensorKey
from tests.adapters.adapter_samples import KINDS, LORA, MODULE, spec_of, trained_weights, write_folder

pytestmark = pytest.mark.usefixtures("bent_is_registered", "one_thread")
BOUND = 1e-10
TOKENS = torch.arange(5, 45).reshape(2, 20)
Arrays = dict[TensorKey, Any]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: save_tiny_model(kind, tmp_path_factory.mktemp(kind), dtype="float64")
        for kind in ("llama", "gpt2")
    }


def stock_model(path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    wide_norms(model)
    return model


def row_losses_in_service(path: Path, spec: AdapterSpec, weights: Arrays) -> list[float]:
    """Sum of -log p over each row's tokens, as the service's forward computes it."""
    tapped = TappedModel.load(path, dtype="float64", attention="sdpa")
    segments = []
    for number, tokens in enumerate(TOKENS.numpy().astype(np.int32)):
        lease = Lease(job_id=f"job-{number}", epoch=1, device_id="device")
        tapped.install(lease, spec, 0, {key: torch.from_numpy(array) for key, array in weights.items()})
        counted = np.ones(len(tokens), np.float32)
        counted[0] = 0.0
        row = Row(tokens=tokens, weights=counted)
        segments.append(Segment(lease=lease, version=0, rows=(row,), loss_denominator=1.0))
    result = tapped.run(BaseStep(number=1, segments=tuple(segments), train=False), lambda tap: None)
    return [loss.loss_sum for loss in result.losses]


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def row_losses(logits: torch.Tensor) -> list[float]:
    chosen = torch.log_softmax(logits[:, :-1], -1).gather(-1, TOKENS[:, 1:, None])
    return (-chosen.sum(dim=(1, 2))).tolist()


def attached_logits(path: Path, folder: Path) -> torch.Tensor:
    model = stock_model(path)
    bare = logits_of(model)
    attached = attach_adapter(model, folder)
    logits = logits_of(model)
    assert (logits - bare).abs().max() > 0.1
    attached.detach()
    assert torch.equal(logits_of(model), bare), "detaching leaves the base model as it was"
    return logits


def specs(kind: ModelKind) -> dict[str, AdapterSpec]:
    """Each kind everywhere, and mixtures at different sites."""
    sites = tiny_sites(kind)
    parts = [(each, sites[n :: len(KINDS)]) for n, each in enumerate(KINDS.values())]
    loras = [each for each in KINDS.values() if isinstance(each, LoraKind | LinearizedLoraKind)]
    return {
        **{name: spec_of((each, sites)) for name, each in KINDS.items()},
        "every kind": spec_of(*parts),
        "loras": spec_of(*((each, sites[n :: len(loras) + 1]) for n, each in enumerate(loras))),
        "ranks of rslora": spec_of(
            (KINDS["rslora"], sites[::2]), (LoraKind(rank=2, alpha=7.0, use_rslora=True), sites[1::2])
        ),
    }


IN_PEFT = ["lora", "rslora", "linearized-zero", "linearized-random", "linearized-rslora"]
IN_PEFT += ["loras", "ranks of rslora"]


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("name", list(specs("llama")))
def test_an_exported_adapter_computes_what_it_computed_in_the_service(
    models: dict[str, Path], model: ModelKind, name: str, tmp_path: Path
) -> None:
    spec = specs(model)[name]
    weights = trained_weights(spec)
    folder = write_folder(tmp_path / "adapter", adapter_folder(spec, weights, "base"))
    assert ("peft_type" in json.loads((folder / CONFIG_FILE).read_bytes())) == (name in IN_PEFT)
    logits = attached_logits(models[model], folder)
    expected = row_losses_in_service(models[model], spec, weights)
    assert row_losses(logits) == pytest.approx(expected, rel=BOUND)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("name", IN_PEFT)
def test_peft_loads_any_mixture_of_loras_and_computes_the_same(
    models: dict[str, Path], model: ModelKind, name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    spec = specs(model)[name]
    folder = write_folder(
        tmp_path / "adapter", adapter_folder(spec, trained_weights(spec), str(models[model]))
    )
    loaded = peft.PeftModel.from_pretrained(stock_model(models[model]), folder).eval()
    expected = attached_logits(models[model], folder)
    torch.testing.assert_close(logits_of(loaded), expected, rtol=BOUND, atol=BOUND)
    adapted = [name for name, module in loaded.get_base_model().named_modules() if hasattr(module, "lora_A")]
    assert adapted == [site.name for site in spec.sites]
    assert not [str(w.message) for w in recwarn if "pattern" in str(w.message) or "lora" in str(w.message)]


def folder_config(*parts: tuple[Any, tuple[Site, ...]]) -> dict[str, Any]:
    spec = spec_of(*parts)
    return json.loads(adapter_folder(spec, trained_weights(spec), "base")[CONFIG_FILE])


def test_parts_that_differ_become_patterns_of_one_site_each() -> None:
    sites = tiny_sites("llama")
    config = folder_config((LORA, sites[:3]), (LoraKind(rank=4, alpha=6.0, use_rslora=True), sites[3:4]))
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 5, False)
    key = r"^model\.layers\.0\.self_attn\.o_proj"
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({key: 4}, {key: 12})


def test_rslora_everywhere_keeps_its_flag_and_its_alpha() -> None:
    config = folder_config((KINDS["rslora"], tiny_sites("llama")))
    assert (config["lora_alpha"], config["use_rslora"], config["rank_pattern"]) == (2.5, True, {})


def test_a_linearized_lora_is_of_its_own_rank_only_while_b0_is_zero() -> None:
    sites = tiny_sites("llama")
    assert folder_config((KINDS["linearized-zero"], sites))["r"] == 3
    doubled = folder_config((KINDS["linearized-random"], sites))
    assert (doubled["r"], doubled["lora_alpha"]) == (4, 10)


def test_patterns_of_others_are_read_as_peft_reads_them(models: dict[str, Path]) -> None:
    """The first pattern that matches counts: a name, its last parts, or anchored at the start."""
    sites = tiny_sites("llama")
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules="all-linear",
        rank_pattern={"self_attn.q_proj": 4, r"layers\.1\.self_attn\.o_proj": 5, "q_proj": 7},
        alpha_pattern={"^model.layers.2.mlp.up_proj": 8, "^up_proj": 10, "up_proj": 9},
    )
    theirs = peft.get_peft_model(stock_model(models["llama"]), config)
    tensors = peft.get_peft_model_state_dict(theirs)
    fields = {key: value for key, value in config.to_dict().items() if not isinstance(value, set)}
    files = {
        CONFIG_FILE: json.dumps({**fields, "peft_type": "LORA"}).encode(),
        WEIGHTS_FILE: save({name: tensor.contiguous() for name, tensor in tensors.items()}),
    }
    kinds = read_peft_folder(files, sites).spec.kinds
    for site in sites:
        layer = theirs.get_base_model().get_submodule(site.name)
        found = (kinds[site.index].rank, kinds[site.index].scaling)
        assert found == (layer.r["default"], layer.scaling["default"]), site.name


def test_an_adapter_of_another_base_model_is_not_attached(models: dict[str, Path], tmp_path: Path) -> None:
    spec = spec_of((MODULE, tiny_sites("gpt2")))
    folder = write_folder(tmp_path / "adapter", adapter_folder(spec, trained_weights(spec), "base"))
    with pytest.raises(InvalidInput, match=r"transformer.h.0.attn.c_attn.*does not have") as caught:
        attach_adapter(stock_model(models["llama"]), folder)
    assert caught.value.reason == "ADAPTER_FILE_INVALID"


def test_a_module_that_is_not_registered_here_is_named(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of((MODULE, tiny_sites("gpt2")))
    folder = write_folder(tmp_path / "adapter", adapter_folder(spec, trained_weights(spec), "base"))
    monkeypatch.setattr(module_registry, "_factories", {})
    module_registry.module_shapes.cache_clear()
    with pytest.raises(InvalidInput, match="'bent'") as caught:
        attach_adapter(stock_model(models["gpt2"]), folder)
    assert caught.value.reason == "ADAPTER_MODULE_UNKNOWN"


def test_an_attached_adapter_follows_the_models_dtype(models: dict[str, Path], tmp_path: Path) -> None:
    spec = specs("gpt2")["every kind"]
    folder = write_folder(tmp_path / "adapter", adapter_folder(spec, trained_weights(spec), "base"))
    model = AutoModelForCausalLM.from_pretrained(models["gpt2"], dtype=torch.bfloat16).eval()
    attach_adapter(model, folder)
    assert logits_of(model).dtype == torch.bfloat16
