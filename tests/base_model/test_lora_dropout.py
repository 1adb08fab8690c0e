"""LoRA dropout in mixed batches against ordinary modules with the same masks; off outside training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cola_runtime.adapter_spec import AdapterPart, AdapterSpec, LinearKind, LoraKind
from cola_runtime.adapters.dropout import SegmentDropout
from cola_runtime.base_model.model import TappedModel
from cola_runtime.encodings import Encoding
from cola_runtime.gradients.taps import Tap
from cola_runtime.testing.ordinary_modules import OrdinaryAdapter, wide_norms
from cola_runtime.testing.peft_reference import batch_loss, relative_difference
from cola_runtime.types import BaseStep, Segment, Site, TensorKind
from tests.base_model.conftest import TinyFolder
from tests.base_model.mixed_samples import (
    Tenant,
    Weights,
    gradients_of,
    random_row,
    run_segments,
    trained_weights,
)

MODELS = ["llama", "gpt2"]
VERSION, FIRST_ROW = 3, 2


def tenant(number: int, sites: tuple[Site, ...], lengths: tuple[int, ...], **kind: Any) -> Tenant:
    part = AdapterPart(kind=LoraKind(**{"rank": 3, "alpha": 6.0 + number, **kind}), sites=sites)
    spec = AdapterSpec(parts=(part,), seed=number, dtype="float64")
    rows = tuple(random_row(length, seed=100 * number + k) for k, length in enumerate(lengths))
    return Tenant(job_id=f"job-{number}", spec=spec, weights=trained_weights(spec), rows=rows)


def mixed_tenants(sites: tuple[Site, ...]) -> list[Tenant]:
    """0 and 1 make one cohort of different p; 2 drops nothing; 3 has fewer sites; all have other lengths."""
    return [
        tenant(0, sites, (17, 9), dropout=0.3),
        tenant(1, sites, (5, 21), dropout=0.6, use_rslora=True),
        tenant(2, sites, (12, 8)),
        tenant(3, sites[1::3], (29,), dropout=0.5),
    ]


def segment(member: Tenant, encoding: Encoding = Encoding.ADAPTER_GRADIENT) -> Segment:
    return replace(member.segment(encoding), version=VERSION, first_row=FIRST_ROW)


def loaded(path: Path, tenants: list[Tenant]) -> TappedModel:
    tapped = TappedModel.load(path, dtype="float64", attention="eager")
    for member in tenants:
        tapped.install(member.lease, member.spec, VERSION, member.weights)
    return tapped


def masks_of(member: Tenant, site: Site, tokens: int) -> Tensor:
    """m / (1 - p) of a batch of the tenant's rows alone, [rows, tokens, I]."""
    kind = member.spec.kinds[site.index]
    assert isinstance(kind, LoraKind)
    draw = SegmentDropout(
        dropout=kind.dropout,
        seed=member.spec.seed,
        version=VERSION,
        rows=tuple(range(FIRST_ROW, FIRST_ROW + len(member.rows))),
        lengths=tuple(len(row.tokens) for row in member.rows),
    )
    mask = draw.mask(site, tokens).view(len(member.rows), tokens, -1)
    return mask.double() / (1 - kind.dropout)


def autograd_gradients(path: Path, member: Tenant) -> tuple[Weights, float]:
    """h = f(x) + s B A (m x / (1 - p)) by forward hooks in the stock model, the tenant alone."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="sdpa")
    wide_norms(model.requires_grad_(False).eval())
    parameters = {}
    for site in member.spec.sites:
        adapter = OrdinaryAdapter(member.spec.kinds[site.index], site, member.weights)

        def add(_module: Any, args: Any, output: Tensor, adapter: Any = adapter, site: Site = site) -> Tensor:
            return output + adapter(args[0] * masks_of(member, site, args[0].shape[1]))

        model.get_submodule(site.name).register_forward_hook(add)
        parameters.update(adapter.named)
    loss = batch_loss(model, member.rows)
    loss.backward()
    grads = {key.gradient: p.grad for key, p in parameters.items() if p.grad is not None}
    return grads, loss.item()


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize("model", MODELS)
def test_every_encoding_gives_the_gradient_of_the_masked_adapter(
    tiny_folder: TinyFolder, model: str, encoding: Encoding
) -> None:
    path = tiny_folder(model, "float64")
    tapped = loaded(path, [])
    tenants = mixed_tenants(tapped.sites)
    tapped = loaded(path, tenants)
    result, taps = run_segments(tapped, [segment(member, encoding) for member in tenants])
    for position, member in enumerate(tenants):
        expected, loss = autograd_gradients(path, member)
        found = result.losses[position]
        assert found.loss_sum / found.weight_sum == pytest.approx(loss, rel=1e-10)
        differences = relative_difference(gradients_of(taps, position, member), expected)
        assert max(differences.values()) < 1e-10


def dropped_entries(taps: list[Tap], position: int) -> dict[int, list[list[bool]]]:
    """Where each site's x is zero, token by token; in an order of their own, since rows may be in passes."""
    found: dict[int, list[list[bool]]] = {}
    for tap in taps:
        for key, tensor in tap.tensors.items():
            if tap.segment == position and key.kind is TensorKind.INPUT:
                found.setdefault(key.site, []).extend((tensor == 0).tolist())
    return {site: sorted(entries) for site, entries in found.items()}


@pytest.mark.parametrize("model", MODELS)
def test_a_tenant_has_the_same_masks_and_gradients_in_every_mix_and_split(
    tiny_folder: TinyFolder, model: str
) -> None:
    path = tiny_folder(model, "float64")
    tenants = mixed_tenants(loaded(path, []).sites)
    tapped = loaded(path, tenants)
    first = tenants[0]
    wanted = segment(first, Encoding.ACTIVATIONS)
    _, alone = run_segments(tapped, [wanted])
    others = [segment(member) for member in tenants[1:]]
    _, mixed = run_segments(tapped, [*others, wanted])
    assert dropped_entries(alone, 0).keys() == {site.index for site in first.spec.sites}
    assert dropped_entries(mixed, 3) == dropped_entries(alone, 0)
    parts = [
        replace(wanted, rows=wanted.rows[:1]),
        replace(wanted, rows=wanted.rows[1:], microbatch=1, first_row=FIRST_ROW + 1),
    ]
    expected = gradients_of(alone, 0, first)
    assert max(relative_difference(gradients_of(mixed, 3, first), expected).values()) < 1e-10
    split = [gradients_of(run_segments(tapped, [part])[1], 0, first) for part in parts]
    sums = {key: split[0][key] + split[1][key] for key in expected}
    assert max(relative_difference(sums, expected).values()) < 1e-10


@pytest.mark.parametrize("model", MODELS)
def test_evaluation_and_generation_drop_nothing(tiny_folder: TinyFolder, model: str) -> None:
    path = tiny_folder(model, "float64")
    dropping = mixed_tenants(loaded(path, []).sites)[0]
    plain = tenant(0, dropping.spec.sites, (17, 9))
    results = []
    for member in (dropping, plain):
        tapped = loaded(path, [member])
        evaluated, _ = run_segments(tapped, [segment(member)], train=False)
        trained, _ = run_segments(tapped, [segment(member)])
        tokens = tapped.generate(member.job_id, [[5, 6, 7]], max_new_tokens=8)
        results.append((evaluated.losses, tokens, trained.losses))
    (evaluated, tokens, trained), (plain_evaluated, plain_tokens, plain_trained) = results
    assert (evaluated, tokens) == (plain_evaluated, plain_tokens)
    assert plain_trained == plain_evaluated
    assert trained[0].loss_sum != evaluated[0].loss_sum


def test_dropout_beside_another_kind_leaves_that_kinds_shared_input_alone(tiny_folder: TinyFolder) -> None:
    """q and v under dropout, k with a full-rank adapter: three inputs of one group in one job."""
    path = tiny_folder("llama", "float64")
    sites = loaded(path, []).sites
    parts = (
        AdapterPart(kind=LoraKind(rank=2, dropout=0.4), sites=(sites[0], sites[2])),
        AdapterPart(kind=LinearKind(bias=True), sites=(sites[1], sites[4], sites[5])),
    )
    member = replace(
        tenant(0, sites, (17, 9)), spec=AdapterSpec(parts=parts, seed=1, dtype="float64"), weights={}
    )
    member = replace(member, weights=trained_weights(member.spec))
    tapped = loaded(path, [member])
    found = {
        encoding: gradients_of(run_segments(tapped, [segment(member, encoding)])[1], 0, member)
        for encoding in Encoding
    }
    for gradients in found.values():
        differences = relative_difference(gradients, found[Encoding.ADAPTER_GRADIENT])
        assert max(differences.values()) < 1e-10


def test_without_dropout_a_step_draws_nothing(tiny_folder: TinyFolder, monkeypatch: Any) -> None:
    path = tiny_folder("llama", "float64")
    tenants = mixed_tenants(loaded(path, []).sites)
    tapped = loaded(path, tenants)
    monkeypatch.setattr(SegmentDropout, "_placed", None)
    step = BaseStep(number=1, segments=(segment(tenants[2]),))
    tapped.run(step, lambda tap: None)
    with pytest.raises(TypeError):
        run_segments(tapped, [segment(tenants[0])])


def test_x_of_every_site_travels_with_its_own_mask(tiny_folder: TinyFolder) -> None:
    """k and v, which reach the same losses: the same rows of one x, under two masks."""
    path = tiny_folder("llama", "float64")
    k, v = loaded(path, []).sites[1:3]
    member = tenant(0, (k, v), (17, 9), dropout=0.5)
    _, taps = run_segments(loaded(path, [member]), [segment(member, Encoding.ACTIVATIONS)])
    x_of_k, x_of_v = (
        tensor for tap in taps for key, tensor in tap.tensors.items() if key.kind is TensorKind.INPUT
    )
    both = (x_of_k != 0) & (x_of_v != 0)
    assert torch.equal(x_of_k[both], x_of_v[both])
    assert both.double().mean().item() == pytest.approx(0.25, abs=0.03)
