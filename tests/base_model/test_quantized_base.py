"""A base of 8 or 4 bits: gradients are autograd's through bitsandbytes' own modules; nothing is merged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from cola_runtime.base_model.model import TappedModel
from cola_runtime.encodings import Encoding
from cola_runtime.errors import InvalidInput
from cola_runtime.jobs.plan import training_plan
from cola_runtime.spec import JobSpec
from cola_runtime.testing.architectures import save_causal_model
from cola_runtime.testing.live_bytes import LiveBytes
from cola_runtime.testing.ordinary_modules import add_adapter
from cola_runtime.testing.peft_reference import batch_loss, relative_difference
from cola_runtime.types import BaseStep, Membership, Site, SiteKind
from tests.base_model.conftest import TinyFolder
from tests.base_model.kind_samples import BOUNDS, ZERO, mixed_kinds
from tests.base_model.merged_samples import SUM
from tests.base_model.mixed_samples import (
    Tenant,
    Weights,
    four_tenants,
    gradients_of,
    install_all,
    poisoned,
    run_segments,
)
from tests.base_model.mixed_samples import tenant as lora_tenant

QUANTIZATIONS = ("int8", "nf4")


def loaded(
    path: Path, quantization: str, *, dtype: str = "float32", checkpointing: bool = False
) -> TappedModel:
    return TappedModel.load(
        path,
        dtype=dtype,
        attention="sdpa",
        quantization=quantization,
        activation_checkpointing=checkpointing,
    )


def library_model(path: Path, sites: tuple[Site, ...], quantization: str) -> Any:
    """The stock model with bitsandbytes' modules at the sites.

    In training mode: in evaluation they round x to 8 bits, too, or pack weights in a layout of their own.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    for site in sites:
        module = model.get_submodule(site.name)
        parent = model.get_submodule(site.name.rpartition(".")[0])
        setattr(parent, site.name.rpartition(".")[2], library_module(module, site, quantization))
    model.requires_grad_(False).eval()
    for site in sites:
        model.get_submodule(site.name).train()
    return model


def library_module(module: Any, site: Site, quantization: str) -> nn.Module:
    weight = module.weight.data if site.kind is SiteKind.LINEAR else module.weight.data.t().contiguous()
    shape = {"input_features": site.in_features, "output_features": site.out_features}
    if quantization == "nf4":
        made = bnb.nn.Linear4bit(**shape, quant_type="nf4", compute_dtype=torch.float32)
        made.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=False
        )
    else:
        made = bnb.nn.Linear8bitLt(**shape, has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    made.bias = module.bias
    return made.to("cpu")


def library_gradients(path: Path, member: Tenant, sites: tuple[Site, ...], quantization: str) -> Weights:
    model = library_model(path, sites, quantization)
    parameters = add_adapter(model, member.spec, member.weights)
    batch_loss(model, member.rows).backward()
    return {key.gradient: torch.zeros_like(p) if p.grad is None else p.grad for key, p in parameters.items()}


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(
    ("kind", "encoding", "checkpointing"),
    [
        ("llama", Encoding.ADAPTER_GRADIENT, False),
        ("llama", Encoding.ACTIVATIONS, True),
        ("gpt2", Encoding.WEIGHT_GRADIENT, False),
    ],
)
def test_gradients_are_autograds_through_the_librarys_own_modules(
    tiny_folder: TinyFolder, kind: str, quantization: str, encoding: Encoding, checkpointing: bool
) -> None:
    path = tiny_folder(kind, "float32")
    model = loaded(path, quantization, checkpointing=checkpointing)
    members, encodings = mixed_kinds(model.sites, encoding, "float32")
    members.append(replace(lora_tenant(9, model.sites[1::3], rank=2, lengths=(9, 4), dtype="float32")))
    install_all(model, members)
    segments = [m.segment(e) for m, e in zip(members, [*encodings, encoding], strict=True)]
    _, taps = run_segments(model, segments)
    for position, member in enumerate(members):
        expected = library_gradients(path, member, model.sites, quantization)
        norm = max(float(gradient.norm()) for gradient in expected.values())
        found = relative_difference(gradients_of(taps, position, member), expected)
        assert max(d for k, d in found.items() if expected[k].norm() > 100 * ZERO * norm) < BOUNDS["float32"]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_sites_keep_their_shapes_and_take_fewer_bytes(tmp_path: Path, quantization: str) -> None:
    """Of a model that is nearly all sites: an eighth, and a quarter, of float32, and the scales."""
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    path = save_causal_model("llama", tmp_path, dtype="float32", **sizes)
    plain, small = (loaded(path, each).describe("", "") for each in ("none", quantization))
    assert (small.sites, small.parameters) == (plain.sites, plain.parameters)
    assert small.details["body"] == "PatchedBody" and small.details["quantization"] == quantization
    quantised = [site for site in plain.sites if site.kind is SiteKind.LINEAR]
    in_sites = sum(site.in_features * site.out_features for site in quantised)
    saved = int(plain.details["weight_bytes"]) - int(small.details["weight_bytes"])
    held = 4 * in_sites - saved
    scales = 4 * (in_sites // 64 if quantization == "nf4" else sum(s.out_features for s in quantised))
    assert held == in_sites // (2 if quantization == "nf4" else 1) + scales


def test_no_dense_weight_outlives_its_product(tmp_path: Path) -> None:
    path = save_causal_model("gpt2", tmp_path, dtype="float32", n_layer=4)
    most = {}
    for quantization in ("none", "nf4"):
        model = loaded(path, quantization)
        # Only the first layer is adapted: above it the gradient goes through weights that nobody taps.
        member = lora_tenant(0, model.sites[:4], rank=2, lengths=(4,), dtype="float32")
        install_all(model, [member])
        with LiveBytes() as counted:
            model.run(BaseStep(number=1, segments=(member.segment(),)), lambda tap: None)
        most[quantization] = counted.peak
    largest = 4 * max(site.in_features * site.out_features for site in model.sites)
    assert most["nf4"] - most["none"] < 4 * largest


def test_a_nan_adapter_leaves_its_neighbours_bit_identical(tiny_folder: TinyFolder) -> None:
    model = loaded(tiny_folder("llama", "float32"), "nf4")
    members = four_tenants(model.sites, "float32")
    runs = []
    for second in (members[1], poisoned(members[1])):
        together = [members[0], second, *members[2:]]
        install_all(model, together)
        _, taps = run_segments(model, [member.segment() for member in together])
        runs.append([tap for tap in taps if tap.segment != 1])
    for mine, theirs in zip(*runs, strict=True):
        assert all(torch.equal(mine.tensors[key], tensor) for key, tensor in theirs.tensors.items())


def test_bfloat16_computes_beside_it_and_generates(tiny_folder: TinyFolder) -> None:
    model = loaded(tiny_folder("gpt2", "bfloat16"), "int8", dtype="bfloat16")
    members = four_tenants(model.sites, "float32")
    install_all(model, members)
    result, taps = run_segments(model, [member.segment() for member in members])
    assert all(bool(t.isfinite().all()) for tap in taps for t in tap.tensors.values())
    assert all(loss.reason is None for loss in result.losses)
    assert len(model.generate("job-0", [[5, 6, 7]], max_new_tokens=3)[0]) == 3


def test_nothing_is_merged_into_it_and_float64_is_not_quantised(tiny_folder: TinyFolder) -> None:
    model = loaded(tiny_folder("llama", "float32"), "nf4")
    (member, *_) = four_tenants(model.sites, "float32")
    job = JobSpec.model_validate({"name": "a", "base_model": "tiny", "mode": "merged"})
    for merge in (
        lambda: model.install(member.lease, member.spec, 0, member.weights, membership=Membership(gang=SUM)),
        lambda: training_plan(job, model.describe("tiny", ""), total_steps=1),
    ):
        with pytest.raises(InvalidInput) as caught:
            merge()
        assert caught.value.reason == "MERGED_QUANTIZED"
    with pytest.raises(InvalidInput) as caught:
        loaded(tiny_folder("llama", "float64"), "nf4", dtype="float64")
    assert caught.value.reason == "QUANTIZATION_UNSUPPORTED"
