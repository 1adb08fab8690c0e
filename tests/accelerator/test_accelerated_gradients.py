"""Gradients on an accelerator are autograd's, for every kind and encoding, also when a pass is repeated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cola_runtime.adapter_spec import LoraKind
from cola_runtime.adapters.checkpoint_format import TrainingDefinition
from cola_runtime.base_model.captured import CapturedBody
from cola_runtime.base_model.model import TappedModel
from cola_runtime.device.session import AdapterSession
from cola_runtime.encodings import Encoding
from cola_runtime.testing.peft_reference import Recipe, relative_difference, train_alone
from cola_runtime.types import LearningRateSchedule, OptimizerHyperparameters
from tests.base_model.conftest import TinyFolder
from tests.base_model.kind_samples import BOUNDS, assert_exact, everywhere, mixed_kinds
from tests.base_model.merged_samples import SUM, collaborator
from tests.base_model.mixed_samples import (
    Tenant,
    Weights,
    four_tenants,
    gradients_of,
    install_all,
    random_row,
    run_segments,
    trained_weights,
)
from tests.base_model.mixed_samples import tenant as lora_tenant

STEPS = 20
TRAJECTORY_BOUNDS = {"float64": 1e-6, "float32": 5e-4}  # rotary angles are float32 in either


def loaded(path: Path, dtype: str, accelerator: str) -> TappedModel:
    return TappedModel.load(path, dtype=dtype, attention="eager", accelerator=accelerator)


def gradients(model: TappedModel, tenants: list[Tenant], encoding: Encoding, version: int) -> list[Weights]:
    segments = [replace(member.segment(encoding), version=version) for member in tenants]
    result, taps = run_segments(model, segments)
    assert [loss.reason for loss in result.losses] == [None] * len(tenants)
    return [gradients_of(taps, position, member) for position, member in enumerate(tenants)]


def retold(member: Tenant, seed: int) -> Tenant:
    """Other weights and other tokens, in the same shapes."""
    weights = trained_weights(member.spec.model_copy(update={"seed": 1000 + seed + member.spec.seed}))
    rows = [random_row(len(row.tokens), seed=seed + k) for k, row in enumerate(member.rows)]
    return replace(member, weights=weights, rows=tuple(rows))


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize(
    ("model", "dtype"), [("llama", "float64"), ("llama", "float32"), ("gpt2", "float64")]
)
def test_all_kinds_in_one_batch_are_autograds(
    tiny_folder: TinyFolder, cuda: str, model: str, dtype: str, encoding: Encoding
) -> None:
    """On the processor: tests/base_model/test_adapter_kinds.py."""
    path = tiny_folder(model, dtype)
    tapped = loaded(path, dtype, cuda)
    tenants, encodings = mixed_kinds(tapped.catalogue, encoding, dtype)
    assert_exact(path, tapped, tenants, encodings, BOUNDS[dtype])


def repeated(tiny_folder: TinyFolder, where: str, dtype: str, encoding: Encoding) -> float:
    """The largest difference from a fresh model's gradients over steps of one structure, each with new
    versions and new rows, and with steps of another structure in between.
    """
    path = tiny_folder("llama", dtype)
    model = loaded(path, dtype, where)
    first = four_tenants(model.sites, "float64" if dtype == "float64" else "float32")[1:4]
    worst = 0.0
    for version in range(3):
        tenants = [retold(member, 10 * version) for member in first]
        for member in tenants:
            model.install(member.lease, member.spec, version, member.weights)
        found = gradients(model, tenants, encoding, version)
        gradients(model, tenants[: 1 + version % 2], encoding, version)
        fresh = loaded(path, dtype, where)
        install_all(fresh, tenants)
        for mine, theirs in zip(found, gradients(fresh, tenants, encoding, 0), strict=True):
            worst = max(worst, *relative_difference(mine, theirs).values())
    return worst


@pytest.mark.parametrize("encoding", list(Encoding))
def test_a_pass_like_one_before_computes_its_own_rows_with_its_own_weights(
    tiny_folder: TinyFolder, accelerator: str, encoding: Encoding
) -> None:
    assert repeated(tiny_folder, accelerator, "float64", encoding) < 1e-10


@pytest.mark.parametrize("encoding", list(Encoding))
def test_a_pass_like_one_before_is_the_same_in_bfloat16_too(
    tiny_folder: TinyFolder, cuda: str, encoding: Encoding
) -> None:
    """Through the fused attention, which adds up in no fixed order; the test above is its sibling."""
    assert repeated(tiny_folder, cuda, "bfloat16", encoding) < 2e-2


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_twenty_steps_end_where_torch_alone_ends(tiny_folder: TinyFolder, cuda: str, dtype: str) -> None:
    """On the processor: tests/runtime and benchmarks/exactness.py."""
    path = tiny_folder("llama", dtype)
    model = loaded(path, dtype, cuda)
    member = lora_tenant(0, model.sites, rank=4, lengths=(13, 21), dtype=dtype)
    optimizer = OptimizerHyperparameters(kind="adamw", learning_rate=1e-3, eps=1e-5)
    schedule = LearningRateSchedule(kind="constant", warmup_steps=0, total_steps=STEPS)
    session = AdapterSession(
        TrainingDefinition(spec=member.spec, optimizer=optimizer, schedule=schedule), member.weights
    )
    steps = [tuple(random_row(n, seed=50 * k + n) for n in (13, 21)) for k in range(STEPS)]
    for version, rows in enumerate(steps):
        tenant = replace(member, rows=rows)
        model.install(member.lease, member.spec, version, session.weights())
        _, taps = run_segments(model, [replace(tenant.segment(), version=version)])
        for tap in taps:
            for key, tensor in tap.tensors.items():
                session.add(key, tensor, version=version)
        session.apply(version=version)
    recipe = Recipe(
        spec=member.spec, initial_weights=member.weights, steps=steps, optimizer=optimizer, schedule=schedule
    )
    alone = train_alone(path, recipe, dtype=dtype)
    differences = relative_difference(session.weights(), alone.weights)
    assert max(differences.values()) < TRAJECTORY_BOUNDS[dtype]


@pytest.mark.parametrize("encoding", list(Encoding))
def test_a_merged_adapters_gradient_is_the_mixed_ones(
    tiny_folder: TinyFolder, accelerator: str, encoding: Encoding
) -> None:
    """Alone in its gang with weight 1 the function is the same."""
    path = tiny_folder("llama", "float64")
    mixed, merged = loaded(path, "float64", accelerator), loaded(path, "float64", accelerator)
    kind = four_tenants(mixed.sites, "float64")[0].spec.parts[0].kind
    member = collaborator(0, kind, mixed.sites, SUM)
    install_all(mixed, [member.tenant])
    member.install(merged)
    (expected,) = gradients(mixed, [member.tenant], encoding, 0)
    result, taps = run_segments(merged, [member.segment(encoding)])
    assert result.losses[0].reason is None
    found = gradients_of(taps, 0, member.tenant)
    assert max(relative_difference(found, expected).values()) < 1e-10


def test_bfloat16_is_float32_to_its_digits(tiny_folder: TinyFolder, accelerator: str) -> None:
    narrow = loaded(tiny_folder("llama", "bfloat16"), "bfloat16", accelerator)
    wide = loaded(tiny_folder("llama", "bfloat16"), "float32", accelerator)
    tenants = four_tenants(narrow.sites, "float32")
    for model in (narrow, wide):
        install_all(model, tenants)
    both = [gradients(model, tenants, Encoding.ADAPTER_GRADIENT, 0) for model in (narrow, wide)]
    for found, expected in zip(*both, strict=True):
        assert sum(relative_difference(found, expected).values()) / len(expected) < 0.1


def test_taps_arrive_in_host_memory_and_stay_as_they_were(tiny_folder: TinyFolder, accelerator: str) -> None:
    """What a sender has not sent yet is not overwritten by the steps that follow."""
    model = loaded(tiny_folder("llama", "float32"), "float32", accelerator)
    tenants = four_tenants(model.sites, "float32")
    install_all(model, tenants)
    segments = [member.segment() for member in tenants]
    _, first = run_segments(model, segments)
    copies = [{key: tensor.clone() for key, tensor in tap.tensors.items()} for tap in first]
    for _ in range(4):
        run_segments(model, [retold(m, 7).segment() for m in tenants])
    for tap, copy in zip(first, copies, strict=True):
        for key, tensor in tap.tensors.items():
            assert tensor.device.type == "cpu"
            assert torch.equal(tensor, copy[key])


def test_neighbours_do_not_decide_in_which_dtype_a_tenants_gradients_travel(
    tiny_folder: TinyFolder, accelerator: str
) -> None:
    """Equal layouts with s = 2, 1.5 and 1 would stack. Three times, since a pass that comes again is
    captured; then the middle one has s = 4: of the same rows, and yet another pass.
    """
    tapped = loaded(tiny_folder("llama", "bfloat16"), "bfloat16", accelerator)
    wide, narrow = {torch.float32}, {torch.bfloat16}
    for alphas, expected in (((8, 6, 4), [narrow, wide, narrow]), ((8, 16, 4), [narrow] * 3)):
        tenants = [
            replace(
                everywhere(1, LoraKind(rank=4, alpha=alpha), tapped.sites, "float32"), job_id=f"job-{number}"
            )
            for number, alpha in enumerate(alphas)
        ]
        install_all(tapped, tenants)
        for _ in range(3):
            _, taps = run_segments(tapped, [member.segment() for member in tenants])
            dtypes = [
                {t.dtype for tap in taps if tap.segment == s for t in tap.tensors.values()} for s in range(3)
            ]
            assert dtypes == expected


def test_passes_are_captured_again_when_a_larger_one_has_moved_their_buffers(
    tiny_folder: TinyFolder, cuda: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And all but the first of its family are, with as many ghosts as their cohorts need (on the processor:
    tests/base_model/test_ghosts.py).
    """
    replayed: list[int] = []
    backward = CapturedBody.backward
    monkeypatch.setattr(
        CapturedBody,
        "backward",
        lambda body, grad_ND: (replayed.append(len(grad_ND)), backward(body, grad_ND)),
    )
    path = tiny_folder("llama", "float64")
    model = loaded(path, "float64", cuda)
    kind = LoraKind(rank=4, alpha=8)
    five = [
        replace(everywhere(3, kind, model.sites, "float64"), job_id=f"job-{number}") for number in range(5)
    ]
    sizes = [(2, 12), (2, 12), (5, 12), (5, 100), (2, 12), (5, 100), (3, 12)]
    for version, (count, length) in enumerate(sizes):
        rows = [(random_row(length, seed=10 * version + number),) for number in range(count)]
        tenants = [replace(retold(member, version), rows=of) for member, of in zip(five, rows, strict=False)]
        for member in tenants:
            model.install(member.lease, member.spec, version, member.weights)
        fresh = loaded(path, "float64", cuda)
        install_all(fresh, tenants)
        expected = gradients(fresh, tenants, Encoding.ADAPTER_GRADIENT, 0)
        for mine, theirs in zip(
            gradients(model, tenants, Encoding.ADAPTER_GRADIENT, version), expected, strict=True
        ):
            assert max(relative_difference(mine, theirs).values()) < 1e-10
    assert replayed == [2 * 16, 6 * 16, 6 * 112, 2 * 16, 6 * 112, 3 * 16]
    assert "could not be captured" not in caplog.text
