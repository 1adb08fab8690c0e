"""Every adapter kind, mixed in one batch and within one job, against ordinary modules and autograd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from cola_runtime.adapter_spec import AdapterPart, ModuleKind
from cola_runtime.adapters import module_registry
from cola_runtime.adapters.module_registry import register_adapter_module
from cola_runtime.base_model.model import TappedModel
from cola_runtime.encodings import Encoding
from cola_runtime.testing.peft_reference import batch_loss, relative_difference
from cola_runtime.types import TensorKey, TensorKind
from tests.base_model.conftest import TinyFolder
from tests.base_model.kind_samples import BOUNDS, KINDS, assert_exact, everywhere, mixed_kinds, tenant
from tests.base_model.mixed_samples import gradients_of, install_all, run_segments


class Gated(nn.Module):
    """Nothing that the runtime knows: a product of two projections."""

    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(inputs, width), nn.Linear(inputs, width, bias=False)
        self.down = nn.Linear(width, outputs)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.sigmoid(self.gate(x)) * self.up(x))


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleKind]:
    monkeypatch.setattr(module_registry, "_factories", {})
    register_adapter_module("gated", lambda i, o, options: Gated(i, o, int(options["width"])))
    yield ModuleKind(name="gated", options=(("width", 3),), scaling=0.7)
    module_registry.module_shapes.cache_clear()


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize(
    ("model", "dtype"), [("llama", "float64"), ("llama", "float32"), ("gpt2", "float64")]
)
def test_all_kinds_mixed_in_one_batch_are_autograds(
    tiny_folder: TinyFolder, model: str, dtype: str, encoding: Encoding
) -> None:
    path = tiny_folder(model, dtype)
    tapped = TappedModel.load(path, dtype=dtype, attention="eager")
    tenants, encodings = mixed_kinds(tapped.catalogue, encoding, dtype)
    assert_exact(path, tapped, tenants, encodings, BOUNDS[dtype])


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_kinds_mixed_within_one_job_by_site_are_autograds(
    tiny_folder: TinyFolder, model: str, gated: ModuleKind
) -> None:
    """Two kinds at one input group (q and v against k), a module elsewhere, and sites without any."""
    path = tiny_folder(model, "float64")
    tapped = TappedModel.load(path, dtype="float64", attention="eager")
    sites = tapped.sites
    parts = (
        AdapterPart(kind=KINDS["lora"], sites=(sites[0], sites[2])),
        AdapterPart(kind=KINDS["linear-bias"], sites=(sites[1],)),
        AdapterPart(kind=KINDS["linearized-random"], sites=sites[4:6]),
        AdapterPart(kind=KINDS["mlp-relu"], sites=sites[7:]),
    )
    mixed = [tenant(0, parts, "float64"), tenant(1, parts[::-1], "float64"), tenant(4, parts, "float64")]
    plain = everywhere(2, KINDS["lora"], sites, "float64")
    plan = [
        Encoding.ADAPTER_GRADIENT,
        Encoding.ACTIVATIONS,
        Encoding.ADAPTER_GRADIENT,
        Encoding.WEIGHT_GRADIENT,
    ]
    assert_exact(path, tapped, [*mixed, plain], plan, BOUNDS["float64"])


@pytest.mark.parametrize("encoding", [Encoding.ACTIVATIONS, Encoding.ADAPTER_GRADIENT])
def test_a_registered_module_trains_like_autograd(
    tiny_folder: TinyFolder, gated: ModuleKind, encoding: Encoding
) -> None:
    path = tiny_folder("gpt2", "float64")
    tapped = TappedModel.load(path, dtype="float64", attention="eager")
    tenants = [everywhere(n, gated, tapped.sites, "float64") for n in range(2)]
    install_all(tapped, tenants)
    _, taps = run_segments(tapped, [member.segment(encoding) for member in tenants])
    for position, member in enumerate(tenants):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")
        named = {}
        for site in member.spec.sites:
            module = Gated(site.in_features, site.out_features, 3).double()
            for slot, parameter in enumerate(module.parameters()):
                key = TensorKey(site.index, TensorKind.MODULE, slot)
                parameter.data.copy_(member.weights[key])
                named[key.gradient] = parameter
            model.get_submodule(site.name).register_forward_hook(
                lambda _m, args, output, module=module: output + 0.7 * module(args[0])
            )
        batch_loss(model.requires_grad_(False), member.rows).backward()
        expected = {key: parameter.grad for key, parameter in named.items()}
        assert max(relative_difference(gradients_of(taps, position, member), expected).values()) < 1e-10
