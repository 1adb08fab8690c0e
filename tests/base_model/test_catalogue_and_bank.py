"""Which modules are sites, which of them share an input, and what the bank takes in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from cola_runtime.adapter_spec import AdapterPart, AdapterSpec, LinearKind, MlpKind
from cola_runtime.adapters.shapes import weight_shapes
from cola_runtime.adapters.site_modules import module_site
from cola_runtime.base_model import catalogue
from cola_runtime.base_model.layout import AdapterLayout
from cola_runtime.base_model.load import load_frozen_model
from cola_runtime.base_model.model import TappedModel
from cola_runtime.errors import Fenced, InvalidInput, NotFound
from cola_runtime.types import BaseStep, Site, SiteKind, TensorKey, TensorKind
from tests.base_model.conftest import TinyFolder
from tests.base_model.mixed_samples import Tenant, four_tenants


def shapes_by_group(model: TappedModel) -> dict[int, list[str]]:
    groups: dict[int, list[str]] = {}
    for site in model.catalogue:
        groups.setdefault(site.input_group, []).append(site.name.rpartition(".")[2])
    return groups


def test_llamas_sites_share_inputs_as_its_layers_do(tiny_folder: TinyFolder) -> None:
    model = TappedModel.load(tiny_folder("llama", "float32"), dtype="float32", threads=1)
    layer = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert list(shapes_by_group(model).values()) == [*layer * 3, ["embed_tokens"]]
    assert [site.index for site in model.catalogue] == list(range(22))
    assert model.sites == model.catalogue[:21]  # what all-linear names
    key = model.sites[1]
    assert (key.name, key.kind) == ("model.layers.0.self_attn.k_proj", SiteKind.LINEAR)
    assert (key.in_features, key.out_features) == (64, 32)


def test_gpt2s_sites_are_conv1d_and_its_head_is_none(tiny_folder: TinyFolder) -> None:
    model = TappedModel.load(tiny_folder("gpt2", "float32"), dtype="float32", threads=1)
    layer = [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]
    assert list(shapes_by_group(model).values()) == [
        *layer * 3,
        ["wte"],
    ]  # wpe is looked up once for all rows
    assert [site.kind for site in model.catalogue] == [SiteKind.CONV1D] * 12 + [SiteKind.EMBEDDING]
    assert (model.sites[0].in_features, model.sites[0].out_features) == (64, 192)


def test_fused_siblings_keep_their_weights_as_views_of_one_buffer(tiny_folder: TinyFolder) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny_folder("llama", "float32")
    loaded = load_frozen_model(path, dtype="float32", attention="eager")
    stock = AutoModelForCausalLM.from_pretrained(path)
    fused = loaded.groups[0].fused_weight
    assert fused is not None
    key = loaded.model.model.layers[0].self_attn.k_proj.weight
    assert key.data_ptr() == fused[64:].data_ptr()
    for name, parameter in stock.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter)


def test_the_description_tells_limits_and_how_the_model_runs(tiny_folder: TinyFolder) -> None:
    path = tiny_folder("gpt2", "float32")
    model = TappedModel.load(path, dtype="float32", attention="auto", threads=1)
    description = model.describe("tiny", "127.0.0.1:1")
    assert description.architecture == "GPT2LMHeadModel"
    assert (description.context_length, description.vocabulary_size) == (256, 261)
    assert description.sites == model.catalogue
    assert description.details["attention"] in ("eager", "sdpa")
    assert description.details["body"] == "PatchedBody"
    assert description.tokenizer_path == str(path)


@pytest.mark.parametrize(("field", "value"), [("dtype", "float8"), ("attention", "flash")])
def test_unknown_options_are_refused_by_name(tiny_folder: TinyFolder, field: str, value: str) -> None:
    options = {"dtype": "float32", "attention": "eager", field: value}
    with pytest.raises(InvalidInput, match=value):
        load_frozen_model(tiny_folder("gpt2", "float32"), **options)


def test_a_model_that_scales_its_logits_is_refused(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.forward

    def capped(self: LlamaForCausalLM, **inputs: object) -> object:
        output = plain(self, **inputs)
        output.logits = torch.tanh(output.logits)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", capped)
    with pytest.raises(InvalidInput, match="transforms its logits"):
        load_frozen_model(tiny_folder("llama", "float32"), dtype="float32", attention="eager")


def test_the_bank_refuses_old_epochs_and_wrong_tensors(tiny_folder: TinyFolder) -> None:
    model = TappedModel.load(tiny_folder("llama", "float32"), dtype="float32", threads=1)
    member = four_tenants(model.sites, "float32")[0]
    lease = replace(member.lease, epoch=5)
    model.install(lease, member.spec, 3, member.weights)
    with pytest.raises(Fenced):
        model.install(member.lease, member.spec, 4, member.weights)
    first = TensorKey(0, TensorKind.LORA_A)
    foreign = replace(member.spec.sites[0], in_features=63)
    wrong = [
        (member.spec, {key: w for key, w in member.weights.items() if key != first}),
        (member.spec, {**member.weights, first: member.weights[first][:2]}),
        (at_sites(member.spec, (foreign, *member.spec.sites[1:])), member.weights),
        (at_sites(member.spec, (replace(foreign, index=22),)), member.weights),
    ]
    for spec, weights in wrong:
        with pytest.raises(InvalidInput):
            model.install(lease, spec, 4, weights)
    assert model.version(member.job_id) == (5, 3)
    model.install(replace(lease, epoch=6), member.spec, 0, member.weights)
    assert model.version(member.job_id) == (6, 0)


def test_the_bank_keeps_the_version_before_of_adapters_that_may_be_stale(tiny_folder: TinyFolder) -> None:
    model = TappedModel.load(tiny_folder("llama", "float32"), dtype="float32", threads=1)
    stale, exact = four_tenants(model.sites, "float32")[:2]
    for member, max_staleness in ((stale, 1), (exact, 0)):
        for version in (0, 1, 2):
            model.install(member.lease, member.spec, version, member.weights, max_staleness=max_staleness)

    def reasons(member: Tenant, *versions: int) -> list[str | None]:
        segments = (replace(member.segment(), version=version) for version in versions)
        steps = (BaseStep(number=1, segments=(segment,), train=False) for segment in segments)
        return [model.run(step, lambda tap: None).losses[0].reason for step in steps]

    assert reasons(stale, 0, 1, 2, 3) == ["VERSION_STALE", None, None, "VERSION_STALE"]
    assert reasons(exact, 1, 2) == ["VERSION_STALE", None]
    model.evict(stale.job_id)
    assert reasons(stale, 1, 2) == ["ADAPTER_UNKNOWN"] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kind", "scaled"),
    [
        (LinearKind(bias=False, scaling=3.0), {TensorKind.WEIGHT}),  # one tensor
        (LinearKind(bias=True, scaling=3.0), {TensorKind.WEIGHT, TensorKind.BIAS}),
        (MlpKind(hidden=3, scaling=3.0), {TensorKind.MLP_OUT, TensorKind.MLP_OUT_BIAS}),
    ],
    ids=["one tensor", "bias", "mlp"],
)
def test_the_bank_scales_a_copy_and_leaves_what_it_was_given(
    tiny_folder: TinyFolder, kind: LinearKind | MlpKind, scaled: set[TensorKind], dtype: torch.dtype
) -> None:
    site = TappedModel.load(tiny_folder("gpt2", "float32"), dtype="float32", threads=1).sites[0]
    spec = AdapterSpec(parts=(AdapterPart(kind=kind, sites=(site,)),), seed=0)
    weights = {key: torch.randn(shape) for key, shape in weight_shapes(spec).items()}
    given = {key: weight.clone() for key, weight in weights.items()}
    flat = AdapterLayout.of(spec).flatten(weights, spec, dtype)
    factors = {key: 3.0 if key.kind in scaled else 1.0 for key in weights}
    expected = torch.cat([(factors[key] * weight.double()).reshape(-1) for key, weight in given.items()])
    torch.testing.assert_close(flat.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    flat.zero_()
    assert all(torch.equal(weights[key], given[key]) for key in given)


def test_generating_with_an_unknown_adapter_or_beyond_the_context_is_refused(tiny_folder: TinyFolder) -> None:
    model = TappedModel.load(tiny_folder("llama", "float32"), dtype="float32", threads=1)
    with pytest.raises(NotFound):
        model.generate("job-9", [[5, 6]], max_new_tokens=1)
    with pytest.raises(InvalidInput, match="context"):
        model.generate(None, [[5] * 250], max_new_tokens=7)
    with pytest.raises(InvalidInput):
        model.generate(None, [[]], max_new_tokens=1)


def at_sites(spec: AdapterSpec, sites: tuple[Site, ...]) -> AdapterSpec:
    return AdapterSpec(
        parts=(AdapterPart(kind=spec.parts[0].kind, sites=sites),), seed=spec.seed, dtype=spec.dtype
    )


def test_a_source_is_told_by_its_tokens_also_where_rows_are_flattened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.ModuleDict({"reads": nn.Linear(4, 4), "writes": nn.Linear(4, 4)})

    def decode(_model: object, source_BS: torch.Tensor, _real: torch.Tensor, target_BT: torch.Tensor) -> None:
        model["reads"](torch.zeros(source_BS.numel(), 4))
        model["writes"](torch.zeros(target_BT.numel(), 4))

    monkeypatch.setattr(catalogue, "decode", decode)
    sites = [
        module_site(module, index=number, name=name, input_group=number)
        for number, (name, module) in enumerate(model.items())
    ]
    assert catalogue.source_groups(model, sites) == {0}
