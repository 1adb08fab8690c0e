"""Every adapter kind, mixed in one batch and within one job, against ordinary modules and autograd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from cola_runtime.adapter_spec import (
    AdapterKind,
    AdapterPart,
    AdapterSpec,
    LinearizedLoraKind,
    LinearKind,
    LoraKind,
    MlpKind,
    ModuleKind,
)
from cola_runtime.adapters import module_registry
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.adapters.module_registry import register_adapter_module
from cola_runtime.base_model.model import TappedModel
from cola_runtime.testing.ordinary_modules import add_adapter, wide_norms
from cola_runtime.testing.peft_reference import batch_loss, relative_difference
from cola_runtime.types import Encoding, Site, TensorKey, TensorKind
from tests.base_model.conftest import TinyFolder
from tests.base_model.mixed_samples import (
    Tenant,
    Weights,
    gradients_of,
    install_all,
    random_row,
    run_segments,
)

KINDS: dict[str, AdapterKind] = {
    "lora": LoraKind(rank=3, alpha=6.0),
    "rslora": LoraKind(rank=4, alpha=3.0, use_rslora=True),
    "linear": LinearKind(scaling=0.5),
    "linear-bias": LinearKind(bias=True, scaling=2.0),
    "mlp-relu": MlpKind(hidden=7, activation="relu", scaling=1.5),
    "mlp-gelu": MlpKind(hidden=5, activation="gelu"),
    "linearized-zero": LinearizedLoraKind(rank=3, alpha=6.0, initial_b="zero"),
    "linearized-random": LinearizedLoraKind(rank=2, alpha=5.0),
}
NONLINEAR = {"mlp-relu", "mlp-gelu"}
BOUNDS = {"float64": 1e-10, "float32": 1e-5}


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


def random_weights(spec: AdapterSpec) -> Weights:
    draw = torch.Generator().manual_seed(spec.seed)
    return {
        key: weight + 0.1 * torch.randn(weight.shape, generator=draw, dtype=torch.float64).to(weight.dtype)
        for key, weight in initial_weights(spec).items()
    }


def tenant(number: int, parts: tuple[AdapterPart, ...], dtype: str) -> Tenant:
    spec = AdapterSpec(parts=parts, seed=number, dtype=dtype)
    lengths = [(17, 9), (29,), (5, 21), (12,)][number % 4]
    rows = tuple(random_row(length, seed=100 * number + k) for k, length in enumerate(lengths))
    return Tenant(job_id=f"job-{number}", spec=spec, weights=random_weights(spec), rows=rows)


def everywhere(number: int, kind: AdapterKind, sites: tuple[Site, ...], dtype: str) -> Tenant:
    return tenant(number, (AdapterPart(kind=kind, sites=sites),), dtype)


def autograd_gradients(path, member: Tenant, dtype: str) -> Weights:
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    wide_norms(model)
    parameters = add_adapter(model.requires_grad_(False).eval(), member.spec, member.weights)
    batch_loss(model, member.rows).backward()
    return {
        key.gradient: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for key, parameter in parameters.items()
    }


def assert_exact(
    path, tapped: TappedModel, tenants: list[Tenant], encodings: list[Encoding], dtype: str
) -> None:
    install_all(tapped, tenants)
    segments = [member.segment(encoding) for member, encoding in zip(tenants, encodings, strict=True)]
    result, taps = run_segments(tapped, segments)
    assert [loss.reason for loss in result.losses] == [None] * len(tenants)
    bound = BOUNDS[dtype]
    for position, member in enumerate(tenants):
        found = gradients_of(taps, position, member)
        differences = relative_difference(found, autograd_gradients(path, member, dtype))
        worst = max(differences, key=lambda key: differences[key])
        assert differences[worst] < bound, (member.spec.parts[0].kind, worst, differences[worst])


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize(
    ("model", "dtype"), [("llama", "float64"), ("llama", "float32"), ("gpt2", "float64")]
)
def test_all_kinds_mixed_in_one_batch_are_autograds(
    tiny_folder: TinyFolder, model: str, dtype: str, encoding: Encoding
) -> None:
    path = tiny_folder(model, dtype)
    tapped = TappedModel.load(path, dtype=dtype, attention="eager")
    tenants = [everywhere(n, kind, tapped.sites, dtype) for n, kind in enumerate(KINDS.values())]
    encodings = [
        Encoding.ACTIVATIONS if encoding is Encoding.WEIGHT_GRADIENT and name in NONLINEAR else encoding
        for name in KINDS
    ]
    assert_exact(path, tapped, tenants, encodings, dtype)


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
    assert_exact(path, tapped, [*mixed, plain], plan, "float64")


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
        for site in tapped.sites:
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
