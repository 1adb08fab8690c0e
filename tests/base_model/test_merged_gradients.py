"""Taps taken at merged weights give the gradients of a stock model whose weights were merged explicitly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cola_runtime.adapter_spec import AdapterKind, LinearizedLoraKind, LinearKind, LoraKind
from cola_runtime.base_model.model import TappedModel
from cola_runtime.encodings import Encoding
from cola_runtime.testing.peft_reference import relative_difference
from cola_runtime.types import Gang
from tests.base_model.conftest import TinyFolder
from tests.base_model.merged_samples import (
    MEAN,
    SUM,
    Collaborator,
    PlainMerged,
    alone,
    collaboration_gradients,
    collaborator,
)
from tests.base_model.mixed_samples import Weights, gradients_of, run_segments

KINDS: dict[str, AdapterKind] = {
    "lora": LoraKind(rank=3, alpha=6.0),
    "rslora": LoraKind(rank=4, alpha=3.0, use_rslora=True),
    "linear": LinearKind(scaling=0.5),
    "linear-bias": LinearKind(bias=True, scaling=2.0),
    "linearized-zero": LinearizedLoraKind(rank=3, alpha=6.0, initial_b="zero"),
    "linearized-random": LinearizedLoraKind(rank=2, alpha=5.0),
}
MODELS = ("llama", "gpt2")


def load(tiny_folder: TinyFolder, model: str, dtype: str = "float64") -> TappedModel:
    return TappedModel.load(tiny_folder(model, dtype), dtype=dtype, attention="eager")


def tapped_gradients(
    model: TappedModel, members: list[Collaborator], encodings: list[Encoding]
) -> list[Weights]:
    for member in members:
        member.install(model)
    segments = [member.segment(encoding) for member, encoding in zip(members, encodings, strict=True)]
    result, taps = run_segments(model, segments)
    assert [loss.reason for loss in result.losses] == [None] * len(members)
    return [gradients_of(taps, position, member.tenant) for position, member in enumerate(members)]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("model", MODELS)
def test_a_merged_adapters_gradient_is_autograds_under_explicitly_merged_weights(
    tiny_folder: TinyFolder, model: str, kind: str
) -> None:
    tapped = load(tiny_folder, model)
    member = alone(collaborator(1, KINDS[kind], tapped.sites, SUM))
    (expected,) = collaboration_gradients(
        PlainMerged(tiny_folder(model, "float64")), [member], rows_of=0, own=None
    )
    for encoding in Encoding:
        (found,) = tapped_gradients(tapped, [member], [encoding])
        assert max(relative_difference(found, expected).values()) < 1e-10, encoding


@pytest.mark.parametrize("gang", [MEAN, SUM], ids=["mean", "sum"])
@pytest.mark.parametrize("model", MODELS)
def test_a_collaborators_gradient_is_that_of_its_own_rows_with_g_as_it_is(
    tiny_folder: TinyFolder, model: str, gang
) -> None:
    """Four kinds, other sites, other encodings in one base step: the definition, in plain torch."""
    tapped = load(tiny_folder, model)
    chosen = [tapped.sites, tapped.sites[1::3], tapped.sites[len(tapped.sites) // 2 :], tapped.sites[::2]]
    kinds = [KINDS["lora"], KINDS["linear-bias"], KINDS["linearized-random"], KINDS["lora"]]
    members = [collaborator(n, kinds[n], chosen[n], gang) for n in range(4)]
    found = tapped_gradients(tapped, members, [*Encoding, Encoding.ADAPTER_GRADIENT])
    plain = PlainMerged(tiny_folder(model, "float64"))
    for position in range(4):
        expected = collaboration_gradients(plain, members, rows_of=position, own=position)[position]
        assert max(relative_difference(found[position], expected).values()) < 1e-10


def test_float32_weights_merge_to_float32_exactness(tiny_folder: TinyFolder) -> None:
    tapped = load(tiny_folder, "llama", "float32")
    member = alone(collaborator(1, KINDS["lora"], tapped.sites, SUM, dtype="float32"))
    plain = PlainMerged(tiny_folder("llama", "float32"), "float32")
    (expected,) = collaboration_gradients(plain, [member], rows_of=0, own=None)
    (found,) = tapped_gradients(tapped, [member], [Encoding.WEIGHT_GRADIENT])
    assert max(relative_difference(found, expected).values()) < 1e-5


def test_merged_and_unmerged_alone_have_one_gradient_and_one_loss(tiny_folder: TinyFolder) -> None:
    tapped = load(tiny_folder, "gpt2")
    member = alone(collaborator(0, KINDS["lora"], tapped.sites, SUM))
    (merged,) = tapped_gradients(tapped, [member], [Encoding.ACTIVATIONS])
    merged_loss = run_segments(tapped, [member.segment()], train=False)[0].losses[0]
    tapped.install(member.tenant.lease, member.tenant.spec, 0, member.tenant.weights)
    result, taps = run_segments(tapped, [member.tenant.segment()])
    beside = gradients_of(taps, 0, member.tenant)
    assert max(relative_difference(merged, beside).values()) < 1e-10
    assert merged_loss.loss_sum == pytest.approx(result.losses[0].loss_sum, rel=1e-12)


def test_a_collaboration_is_not_the_joint_gradient(tiny_folder: TinyFolder) -> None:
    """Trap 10. The joint gradient has p_k and everybody's rows; ColA's has neither."""
    tapped = load(tiny_folder, "gpt2")
    members = [collaborator(n, KINDS["lora"], tapped.sites, MEAN) for n in range(2)]
    found = tapped_gradients(tapped, members, [Encoding.ACTIVATIONS] * 2)[0]
    plain = PlainMerged(tiny_folder("gpt2", "float64"))
    own, others = (collaboration_gradients(plain, members, rows_of=k, own=None)[0] for k in range(2))
    joint = {key: own[key] + others[key] for key in own}
    assert min(relative_difference(found, joint).values()) > 0.1
    third = {key: 3.0 * gradient for key, gradient in own.items()}  # weights 1 and 2: p = 1/3
    assert max(relative_difference(found, third).values()) < 1e-10


def test_the_mean_of_products_is_merged_and_not_the_product_of_means(tiny_folder: TinyFolder) -> None:
    """Trap 10: mean(B A) is not mean(B) mean(A)."""
    tapped = load(tiny_folder, "gpt2")
    members = [collaborator(n, KINDS["lora"], tapped.sites, MEAN) for n in range(2)]
    weights = [member.tenant.weights for member in members]
    third = {key: (weights[0][key] + 2 * weights[1][key]) / 3 for key in weights[0]}
    for member in members:
        member.install(tapped)
    segment = members[0].segment()
    merged = run_segments(tapped, [segment], train=False)[0].losses[0].loss_sum
    for member in members:
        member.install(tapped, third)
    of_means = run_segments(tapped, [segment], train=False)[0].losses[0].loss_sum
    assert abs(merged - of_means) > 1e-3 * abs(merged)


@pytest.mark.parametrize("model", MODELS)
def test_a_merged_adapter_generates_as_it_does_beside_the_base(tiny_folder: TinyFolder, model: str) -> None:
    tapped = load(tiny_folder, model)
    member = alone(collaborator(0, KINDS["linear-bias"], tapped.sites, SUM))
    tapped.install(member.tenant.lease, member.tenant.spec, 0, member.tenant.weights)
    prompts = [[7, 8, 9]]
    bare = tapped.generate(None, prompts, max_new_tokens=12)
    beside = tapped.generate("job-0", prompts, max_new_tokens=12)
    member.install(tapped)
    assert tapped.generate("job-0", prompts, max_new_tokens=12) == beside != bare
    assert tapped.generate(None, prompts, max_new_tokens=12) == bare
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("gang", [MEAN, SUM], ids=["mean", "sum"])
def test_a_stale_segment_of_a_merged_adapter_sees_the_version_that_it_asks_for(
    tiny_folder: TinyFolder, gang: Gang
) -> None:
    """`max_staleness: 1`: the device's new version is in the bank before the rows of the one before ran."""
    tapped = load(tiny_folder, "gpt2")
    members = [collaborator(n, KINDS["lora"], tapped.sites, gang) for n in range(2)]
    stale, mate = members
    newer = {key: 1.5 * weight for key, weight in stale.tenant.weights.items()}
    mate.install(tapped)
    for version, weights in enumerate((stale.tenant.weights, newer)):
        lease, spec = stale.tenant.lease, stale.tenant.spec
        tapped.install(lease, spec, version, weights, membership=stale.membership, max_staleness=1)
    plain = PlainMerged(tiny_folder("gpt2", "float64"))
    moved = replace(stale, tenant=replace(stale.tenant, weights=newer))
    for version, member in ((0, stale), (1, moved), (0, stale)):
        for encoding in Encoding:
            segments = [replace(stale.segment(encoding), version=version), mate.segment(encoding)]
            _, taps = run_segments(tapped, segments)
            for position in range(2):
                team = [member, mate]
                expected = collaboration_gradients(plain, team, rows_of=position, own=position)[position]
                found = gradients_of(taps, position, team[position].tenant)
                assert max(relative_difference(found, expected).values()) < 1e-10, (version, encoding)
    both = [replace(stale.segment(), version=version) for version in (1, 0)]
    result, _ = run_segments(tapped, [*both, mate.segment()])
    assert [loss.reason for loss in result.losses] == [None, "GANG_MIXED", None]
