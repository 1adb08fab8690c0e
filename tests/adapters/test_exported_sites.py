"""Exports with convolutions and embeddings: stock peft, `attach_adapter` and the service compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.numpy import load
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from cola_runtime.adapter_spec import AdapterKind, LinearizedLoraKind, LinearKind, LoraKind
from cola_runtime.adapters.adapter_files import adapter_folder, read_adapter_folder
from cola_runtime.adapters.attach import attach_adapter
from cola_runtime.adapters.folder_files import CONFIG_FILE, WEIGHTS_FILE
from cola_runtime.adapters.peft_files import peft_folder
from cola_runtime.adapters.site_kinds import unfit
from cola_runtime.adapters.site_modules import module_site, site_kind
from cola_runtime.errors import InvalidInput
from cola_runtime.testing.architectures import save_image_classifier
from cola_runtime.testing.tiny_models import save_tiny_model
from cola_runtime.types import Site, SiteKind
from tests.adapters.adapter_samples import spec_of, trained_weights, write_folder

BOUND = 1e-10
TOKENS = torch.arange(5, 45).reshape(2, 20)
LORA = LoraKind(rank=16, alpha=6.0)
KINDS: dict[str, AdapterKind] = {
    "lora": LORA,
    "linearized": LinearizedLoraKind(rank=2, alpha=1.0),
    "linear": LinearKind(bias=True, scaling=0.5),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp
    return {
        **{kind: save_tiny_model(kind, folder(kind), dtype="float64") for kind in ("llama", "gpt2")},
        **{
            kind: save_image_classifier(kind, folder(kind), dtype="float64")
            for kind in ("vit", "convnext", "resnet")
        },
    }


def stock(path: Path) -> nn.Module:
    of_images = path.joinpath("preprocessor_config.json").is_file()
    auto = AutoModelForImageClassification if of_images else AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=torch.float64).eval()


def sites_of(model: nn.Module, kind: AdapterKind) -> tuple[Site, ...]:
    """Every convolution and embedding that the kind can be at, but for positions, and one dense layer."""
    sites = [
        module_site(module, index=index, name=name, input_group=index)
        for index, (name, module) in enumerate(model.named_modules())
        if site_kind(module) is not None and "head" not in name and name != "transformer.wpe"
    ]
    others = [site for site in sites if site.kind in (SiteKind.CONV2D, SiteKind.EMBEDDING)]
    dense = [site for site in sites if site not in others]
    return tuple(site for site in [*others, *dense[:1]] if unfit(kind, site) is None)


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    if hasattr(model.config, "vocab_size"):
        return model(input_ids=TOKENS, use_cache=False).logits
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model(pixel_values=pixels).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["llama", "gpt2", "vit", "convnext", "resnet"])
def test_an_export_computes_the_same_by_attaching_it_and_in_stock_peft(
    folders: dict[str, Path], model: str, kind: str, tmp_path: Path
) -> None:
    bare = stock(folders[model])
    sites = sites_of(bare, KINDS[kind])
    spec = spec_of((KINDS[kind], sites))
    files = adapter_folder(spec, trained_weights(spec), str(folders[model]))
    if not bare.can_generate() and kind != "linear":  # a job there has a head, and no task_type
        files = peft_folder(spec, trained_weights(spec), str(folders[model]), task_type=None)
    folder = write_folder(tmp_path / "adapter", files)
    before = outputs(bare)
    attached = attach_adapter(bare, folder)
    expected = outputs(bare)
    attached.detach()
    assert (expected - before).abs().max() > 1e-3
    assert read_adapter_folder(files, sites).spec.sites == spec.sites
    if kind == "linear":
        assert "peft_type" not in json.loads(files[CONFIG_FILE])
        return
    loaded = peft.PeftModel.from_pretrained(bare, folder).eval()
    torch.testing.assert_close(outputs(loaded), expected, rtol=BOUND, atol=BOUND)
    stated = {name: tensor.shape for name, tensor in load(files[WEIGHTS_FILE]).items()}
    found = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert stated == {name: tuple(tensor.shape) for name, tensor in found.items()}


def test_what_peft_has_no_convolution_for_is_a_folder_of_our_own(tmp_path: Path) -> None:
    """Its LoRA leaves the dilation out."""
    module = nn.Conv2d(3, 4, 3, dilation=2)
    site = module_site(module, index=0, name="dilated", input_group=0)
    spec = spec_of((LORA, (site,)))
    files = adapter_folder(spec, trained_weights(spec), "base")
    assert json.loads(files[CONFIG_FILE])["format"] == "cola_adapter"
    model = nn.ModuleDict({"dilated": module.double()})
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    before = model["dilated"](images)
    attach_adapter(model, write_folder(tmp_path / "adapter", files))
    assert (model["dilated"](images) - before).abs().max() > 1e-3


def test_a_folder_with_an_adapter_where_none_can_be_is_refused() -> None:
    module = nn.Conv2d(4, 4, 3, groups=4)
    site = module_site(module, index=0, name="grouped", input_group=0)
    spec = spec_of((LORA, (site,)))
    files = adapter_folder(spec, trained_weights(spec), "base")
    config = {**json.loads(files[CONFIG_FILE]), "r": 6}
    with pytest.raises(InvalidInput, match="groups do not divide rank 6"):
        read_adapter_folder({**files, CONFIG_FILE: json.dumps(config).encode()}, (site,))
