"""What the base weights are, when: pristine, merged, restored, and who is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cola_runtime.adapter_spec import AdapterPart, LinearKind, LoraKind, MlpKind
from cola_runtime.base_model.merge import MergedWeights
from cola_runtime.base_model.model import TappedModel
from cola_runtime.errors import InvalidInput
from cola_runtime.types import Gang
from tests.base_model.conftest import TinyFolder
from tests.base_model.merged_samples import MEAN, SUM, alone, collaborator
from tests.base_model.mixed_samples import gradients_of, install_all, run_segments
from tests.base_model.mixed_samples import tenant as unmerged_tenant

LORA = LoraKind(rank=3, alpha=6.0)
MODELS = ("llama", "gpt2")


def load(tiny_folder: TinyFolder, model: str = "llama", dtype: str = "float32") -> TappedModel:
    return TappedModel.load(tiny_folder(model, dtype), dtype=dtype, attention="eager")


def parameters_of(model: TappedModel) -> dict[str, Tensor]:
    return dict(model._loaded.model.named_parameters())


def snapshot(model: TappedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters_of(model).items()}


def assert_pristine(model: TappedModel, before: dict[str, Tensor]) -> None:
    after = parameters_of(model)
    assert [name for name, parameter in before.items() if not torch.equal(after[name], parameter)] == []


@pytest.mark.parametrize("model_kind", MODELS)
def test_a_thousand_merges_leave_the_base_bit_identical(tiny_folder: TinyFolder, model_kind: str) -> None:
    """Trap 6: W += d, W -= d would drift."""
    model = load(tiny_folder, model_kind)
    before = snapshot(model)
    members = [collaborator(n, LORA, model.sites, MEAN, dtype="float32") for n in range(2)]
    for member in members:
        member.install(model)
    merged = model._pass.merged
    teams = [model._bank.gang(MEAN), model._bank.gang(MEAN)[:1]]
    for number in range(1000):
        merged.put(teams[number % 2])
    assert any(not torch.equal(parameters_of(model)[name], w) for name, w in before.items())
    merged.put(())
    assert_pristine(model, before)


@pytest.mark.parametrize("model_kind", MODELS)
def test_a_mixed_step_between_merged_ones_sees_pristine_weights(
    tiny_folder: TinyFolder, model_kind: str
) -> None:
    model = load(tiny_folder, model_kind)
    before = snapshot(model)
    other = unmerged_tenant(5, model.sites, rank=2, lengths=(12,), dtype="float32")
    install_all(model, [other])
    result, taps = run_segments(model, [other.segment()])
    expected = gradients_of(taps, 0, other)
    member = alone(collaborator(0, LORA, model.sites, SUM, dtype="float32"))
    member.install(model)
    run_segments(model, [member.segment()])
    after, taps = run_segments(model, [other.segment()])
    assert_pristine(model, before)
    assert after.losses == result.losses
    assert all(torch.equal(grad, expected[key]) for key, grad in gradients_of(taps, 0, other).items())


def test_the_last_member_leaving_restores_the_base_and_frees_the_pristine_copies(
    tiny_folder: TinyFolder,
) -> None:
    model = load(tiny_folder)
    before = snapshot(model)
    low, high = (
        alone(collaborator(n, LORA, sites, SUM, dtype="float32"))
        for n, sites in enumerate((model.sites[:7], model.sites[5:]))
    )
    assert model._pass.merged.nbytes == 0
    for member in (low, high):
        member.install(model)
        run_segments(model, [member.segment()])
    copied = sum(4 * site.in_features * site.out_features for site in model.sites)
    assert model._pass.merged.nbytes == copied
    model.evict(high.tenant.job_id)
    assert_pristine(model, before)
    assert model._pass.merged.nbytes == sum(4 * s.in_features * s.out_features for s in model.sites[:7])
    model.evict(low.tenant.job_id)
    assert model._pass.merged.nbytes == 0
    assert_pristine(model, before)


def test_the_same_gang_with_the_same_versions_is_merged_once(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_folder)
    members = [collaborator(n, LORA, model.sites, MEAN, dtype="float32") for n in range(2)]
    for member in members:
        member.install(model)
    merged_sites: list[int] = []
    merge = MergedWeights._merge
    monkeypatch.setattr(
        MergedWeights, "_merge", lambda self, index, shares: merged_sites.append(merge(self, index, shares))
    )
    for segments in ([members[0].segment()], [members[1].segment()], [m.segment() for m in members]):
        run_segments(model, segments)
    assert len(merged_sites) == len(model.sites)
    members[1].install(model, version=1)
    run_segments(model, [members[0].segment()])
    assert len(merged_sites) == 2 * len(model.sites)


def test_members_take_no_memory_on_the_models_device_and_their_own_numbers_on_the_host(
    tiny_folder: TinyFolder,
) -> None:
    model = load(tiny_folder)
    for number in range(4):
        member = collaborator(number, LORA, model.sites, MEAN, dtype="float32")
        member.install(model)
        run_segments(model, [member.segment()])
    assert model.bank_bytes.model_device == 0
    assert model.bank_bytes.host == 4 * sum(w.nbytes for w in member.tenant.weights.values())
    install_all(model, [member.tenant])
    assert model.bank_bytes.model_device == sum(w.nbytes for w in member.tenant.weights.values())


def test_weights_installed_are_a_copy(tiny_folder: TinyFolder) -> None:
    model = load(tiny_folder)
    member = alone(collaborator(0, LORA, model.sites, SUM, dtype="float32"))
    weights = {key: weight.clone() for key, weight in member.tenant.weights.items()}
    member.install(model, weights)
    before = run_segments(model, [member.segment()], train=False)[0].losses
    for weight in weights.values():
        weight.zero_()
    model._pass.merged.put(())
    assert run_segments(model, [member.segment()], train=False)[0].losses == before


def test_segments_of_another_gang_or_of_none_are_refused_and_the_first_gangs_are_computed(
    tiny_folder: TinyFolder,
) -> None:
    model = load(tiny_folder)
    members = [collaborator(n, LORA, model.sites, MEAN, dtype="float32") for n in range(3)]
    members[2] = alone(members[2])
    other = unmerged_tenant(5, model.sites, rank=2, lengths=(12,), dtype="float32")
    install_all(model, [other])
    for member in members:
        member.install(model)
    expected, _ = run_segments(model, [members[0].segment(), members[1].segment()])
    stale = replace(other.segment(), version=9)
    segments = [stale, *(member.segment() for member in members), other.segment()]
    result, taps = run_segments(model, segments)
    reasons = [loss.reason for loss in result.losses]
    assert reasons == ["VERSION_STALE", None, None, "GANG_MIXED", "GANG_MIXED"]
    assert result.losses[1:3] == expected.losses
    assert {tap.segment for tap in taps} == {1, 2}
    mixed, _ = run_segments(model, [other.segment(), members[0].segment()])
    assert [loss.reason for loss in mixed.losses] == [None, "GANG_MIXED"]


def test_a_segment_that_says_another_gang_than_the_bank_is_refused(tiny_folder: TinyFolder) -> None:
    model = load(tiny_folder)
    member = collaborator(0, LORA, model.sites, MEAN, dtype="float32")
    member.install(model)
    for gang in (None, SUM, Gang(name="group/another", combine="mean")):
        result, taps = run_segments(model, [replace(member.segment(), gang=gang)])
        assert result.losses[0].reason == "GANG_MISMATCH"
        assert taps == []


@pytest.mark.parametrize("model_kind", MODELS)
def test_a_member_with_nan_weights_leaves_the_gang_and_is_refused(
    tiny_folder: TinyFolder, model_kind: str
) -> None:
    model = load(tiny_folder, model_kind)
    healthy, sick = (collaborator(n, LORA, model.sites, MEAN, dtype="float32") for n in range(2))
    healthy.install(model)
    without, _ = run_segments(model, [healthy.segment()])
    sick.install(model)
    poisoned = {key: torch.full_like(weight, torch.nan) for key, weight in sick.tenant.weights.items()}
    with pytest.raises(InvalidInput) as caught:
        sick.install(model, poisoned, version=1)
    assert caught.value.reason == "NON_FINITE_ADAPTER"
    result, _ = run_segments(model, [healthy.segment(), sick.segment()])
    assert result.losses[0] == without.losses[0]
    assert result.losses[1].reason == "ADAPTER_UNKNOWN"


def test_the_base_model_itself_refuses_what_cannot_be_merged(tiny_folder: TinyFolder) -> None:
    model = load(tiny_folder)
    member = collaborator(0, LORA, model.sites, MEAN, dtype="float32")
    part = AdapterPart(kind=MlpKind(hidden=3), sites=model.sites[:1])
    nonlinear = collaborator(1, part.kind, part.sites, MEAN, dtype="float32")
    with pytest.raises(InvalidInput) as caught:
        nonlinear.install(model)
    assert caught.value.reason == "MERGED_NEEDS_LINEAR"
    half = load(tiny_folder, dtype="bfloat16")
    with pytest.raises(InvalidInput) as caught:
        member.install(half)
    assert caught.value.reason == "MERGED_DTYPE"


def test_a_site_whose_weight_is_another_modules_is_told_and_refused(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cola_runtime.base_model import load as loading

    read = loading._read

    def tied(*arguments: object) -> object:
        model = read(*arguments)
        model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
        return model

    monkeypatch.setattr(loading, "_read", tied)
    model = load(tiny_folder)
    shared = tuple(
        site.index for site in model.sites if site.name.endswith(("0.mlp.down_proj", "1.mlp.down_proj"))
    )
    assert model.describe("tiny", "").tied_sites == shared
    assert len(shared) == 2
    with pytest.raises(InvalidInput) as caught:
        collaborator(0, LORA, model.sites, MEAN, dtype="float32").install(model)
    assert caught.value.reason == "MERGED_TIED_WEIGHT"
    assert "layers.0.mlp.down_proj" in str(caught.value)
    allowed = tuple(site for site in model.sites if site.index not in shared)
    collaborator(0, LORA, allowed, MEAN, dtype="float32").install(model)


def test_a_failed_merge_is_done_again(tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure half-way must not leave weights that count as the gang's."""
    model = load(tiny_folder)
    before = snapshot(model)
    member = alone(collaborator(0, LinearKind(), model.sites, SUM, dtype="float32"))
    member.install(model)
    expected = run_segments(model, [member.segment()])[0].losses
    model._pass.merged.put(())
    merge = MergedWeights._merge

    def fail_half_way(self: MergedWeights, index: int, shares: object) -> None:
        merge(self, index, shares)
        if index == 9:
            raise ArithmeticError

    with monkeypatch.context() as patched:
        patched.setattr(MergedWeights, "_merge", fail_half_way)
        for _ in range(2):
            with pytest.raises(ArithmeticError):
                run_segments(model, [member.segment()])
        model.generate(None, [[5]], max_new_tokens=1)
        assert_pristine(model, before)
        with pytest.raises(ArithmeticError):
            run_segments(model, [member.segment()])
    assert run_segments(model, [member.segment()])[0].losses == expected
    model.evict(member.tenant.job_id)
    assert_pristine(model, before)
