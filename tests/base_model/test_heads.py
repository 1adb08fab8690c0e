"""Classification and regression in mixed batches, against transformers' own models and autograd."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cola_runtime.adapter_spec import (
    AdapterKind,
    AdapterPart,
    AdapterSpec,
    HeadKind,
    LinearKind,
    LoraKind,
    MlpKind,
    head_part,
)
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.adapters.checkpoint_format import TrainingDefinition
from cola_runtime.base_model.body import PatchedBody
from cola_runtime.base_model.model import TappedModel
from cola_runtime.device.session import AdapterSession
from cola_runtime.encodings import Encoding
from cola_runtime.errors import InvalidInput
from cola_runtime.rows import Row
from cola_runtime.testing.peft_reference import Recipe, relative_difference
from cola_runtime.testing.sequence_reference import sequence_model, sequence_output, train_sequence_alone
from cola_runtime.types import LearningRateSchedule, OptimizerHyperparameters, TensorKey, TensorKind
from tests.base_model.conftest import TinyFolder
from tests.base_model.mixed_samples import (
    Tenant,
    Weights,
    gradients_of,
    install_all,
    peft_gradients,
    poisoned,
    random_row,
    run_segments,
    tenant,
)

ENCODERS = ("bert", "roberta")
DECODERS = ("llama", "gpt2")
BOUNDS = {"float64": 1e-10, "float32": 1e-5}
HEADS = (HeadKind(labels=2), HeadKind(labels=7), HeadKind(labels=3), HeadKind(labels=1, problem="regression"))
BODIES: tuple[AdapterKind, ...] = (
    LoraKind(rank=4, alpha=6.0),
    LoraKind(rank=4, alpha=3.0),
    LinearKind(bias=True, scaling=0.5),
    MlpKind(hidden=5, activation="gelu"),
)
LENGTHS = ((17, 5), (9, 29), (8, 21, 12), (25, 3, 6))


def random_weights(spec: AdapterSpec) -> Weights:
    draw = torch.Generator().manual_seed(spec.seed)
    return {
        key: weight + 0.1 * torch.randn(weight.shape, generator=draw, dtype=torch.float64).to(weight.dtype)
        for key, weight in initial_weights(spec).items()
    }


def labelled_row(length: int, head: HeadKind, *, seed: int, pair: bool) -> Row:
    random = np.random.default_rng(seed)
    label = float(random.normal()) if head.problem == "regression" else int(random.integers(0, head.labels))
    return Row(
        tokens=random.integers(5, 250, length, dtype=np.int32),
        weights=np.empty(0, np.float32),
        label=label,
        token_types=(np.arange(length) > length // 2).astype(np.int8) if pair else None,
    )


def labelled(tapped: TappedModel, number: int, dtype: str, *, body: bool = True) -> Tenant:
    """Tenants 0 and 1 stack: equal LoRA shapes and rows, different heads.

    A bias on BERT's keys shifts all scores of a query alike: its gradient is nothing but rounding, which
    AdamW would blow up to full steps. So kinds with a bias leave keys out.
    """
    head = HEADS[number]
    sites = tuple(site for site in tapped.sites if number < 2 or not site.name.endswith(".key"))
    description = tapped.describe("tiny", "")
    parts = [AdapterPart(kind=BODIES[number], sites=sites)] if body else []
    parts.append(head_part(head, tapped.catalogue, hidden_size=description.hidden_size))
    spec = AdapterSpec(parts=tuple(parts), seed=number, dtype=dtype)
    pair = description.architecture.startswith("Bert")
    rows = tuple(
        labelled_row(length, head, seed=10 * number + place, pair=pair)
        for place, length in enumerate(LENGTHS[number])
    )
    return Tenant(job_id=f"job-{number}", spec=spec, weights=random_weights(spec), rows=rows)


def stock_gradients(path: Path, member: Tenant, dtype: str) -> tuple[Weights, float]:
    """By autograd through transformers' own classification model and loss; and the mean loss."""
    model, parameters = sequence_model(path, member.spec, member.weights, dtype=dtype)
    loss = sequence_output(model, member.rows).loss
    loss.backward()
    return {key.gradient: parameter.grad for key, parameter in parameters.items()}, float(loss.detach())


def assert_stock(path: Path, tapped: TappedModel, member: Tenant, gradients: Weights, dtype: str) -> None:
    expected, _ = stock_gradients(path, member, dtype)
    differences = relative_difference(gradients, expected)
    worst = max(differences, key=lambda key: differences[key])
    assert differences[worst] < BOUNDS[dtype], (member.job_id, worst, differences[worst])


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, "float64") for kind in (*ENCODERS, *DECODERS)] + [("bert", "float32"), ("llama", "float32")],
)
def test_tenants_with_different_heads_in_one_batch_are_autograds(
    tiny_folder: TinyFolder, kind: str, dtype: str, encoding: Encoding
) -> None:
    path = tiny_folder(kind, dtype)
    tapped = TappedModel.load(path, dtype=dtype, attention="eager")
    tenants = [labelled(tapped, number, dtype) for number in range(4)]
    install_all(tapped, tenants)
    nonlinear = Encoding.ACTIVATIONS if encoding is Encoding.WEIGHT_GRADIENT else encoding
    segments = [t.segment(nonlinear if t.job_id == "job-3" else encoding) for t in tenants]
    result, taps = run_segments(tapped, segments)
    for position, member in enumerate(tenants):
        loss = result.losses[position]
        assert loss.reason is None
        assert loss.weight_sum == len(member.rows)
        _, mean = stock_gradients(path, member, dtype)
        assert loss.loss_sum / loss.weight_sum == pytest.approx(mean, rel=BOUNDS[dtype])
        assert_stock(path, tapped, member, gradients_of(taps, position, member), dtype)


def test_a_causal_tenant_and_labelled_ones_share_a_base_step(tiny_folder: TinyFolder) -> None:
    path = tiny_folder("gpt2", "float64")
    tapped = TappedModel.load(path, dtype="float64", attention="eager")
    writer = tenant(9, tapped.sites, rank=4, lengths=(17, 5), dtype="float64")
    members = [labelled(tapped, 0, "float64"), writer, labelled(tapped, 3, "float64")]
    install_all(tapped, members)
    result, taps = run_segments(tapped, [member.segment() for member in members])
    assert [loss.reason for loss in result.losses] == [None] * 3
    for position in (0, 2):
        assert_stock(
            path, tapped, members[position], gradients_of(taps, position, members[position]), "float64"
        )
    expected, mean = peft_gradients(path, writer, "float64")
    assert max(relative_difference(gradients_of(taps, 1, writer), expected).values()) < 1e-10
    assert result.losses[1].loss_sum / result.losses[1].weight_sum == pytest.approx(mean, rel=1e-10)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_a_head_alone_trains_without_a_pass_back_through_the_body(
    tiny_folder: TinyFolder, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_folder(kind, "float64")
    tapped = TappedModel.load(path, dtype="float64", attention="eager")
    members = [labelled(tapped, number, "float64", body=False) for number in (0, 1, 3)]
    install_all(tapped, members)
    monkeypatch.setattr(type(tapped._pass.body), "backward", lambda *_: pytest.fail("the body went back"))
    _, taps = run_segments(tapped, [member.segment() for member in members])
    for position, member in enumerate(members):
        gradients = gradients_of(taps, position, member)
        assert len(gradients) == 2
        assert_stock(path, tapped, member, gradients, "float64")


def test_twenty_steps_through_sessions_are_adamws_on_the_stock_model(tiny_folder: TinyFolder) -> None:
    """Three tenants mixed, clipped over body and head together, against each alone."""
    path = tiny_folder("bert", "float64")
    tapped = TappedModel.load(path, dtype="float64", attention="eager")
    hyper = OptimizerHyperparameters(kind="adamw", learning_rate=3e-3, weight_decay=0.01, max_grad_norm=0.5)
    schedule = LearningRateSchedule(kind="constant", warmup_steps=0, total_steps=20)
    members = [labelled(tapped, number, "float64") for number in (0, 1, 3)]
    sessions = [
        AdapterSession.create(TrainingDefinition(spec=m.spec, optimizer=hyper, schedule=schedule))
        for m in members
    ]
    for version in range(20):
        for member, session in zip(members, sessions, strict=True):
            tapped.install(member.lease, member.spec, version, session.weights())
        _, taps = run_segments(tapped, [replace(m.segment(), version=version) for m in members])
        for tap in taps:
            for key, tensor in tap.tensors.items():
                sessions[tap.segment].add(key, tensor, version=version)
        for session in sessions:
            session.apply(version=version)
    for member, session in zip(members, sessions, strict=True):
        recipe = Recipe(
            spec=member.spec,
            initial_weights=initial_weights(member.spec),
            steps=[member.rows] * 20,
            optimizer=hyper,
            schedule=schedule,
        )
        alone = train_sequence_alone(path, recipe, dtype="float64").weights
        assert max(relative_difference(session.weights(), alone).values()) < 1e-8


@pytest.mark.parametrize("kind", ["roberta", "llama"])
def test_a_forward_only_step_predicts_what_the_stock_model_does(tiny_folder: TinyFolder, kind: str) -> None:
    path = tiny_folder(kind, "float64")
    tapped = TappedModel.load(path, dtype="float64", attention="eager")
    members = [labelled(tapped, number, "float64") for number in range(4)]
    install_all(tapped, members)
    result, taps = run_segments(tapped, [member.segment() for member in members], train=False)
    assert not taps
    for member, loss in zip(members, result.losses, strict=True):
        model, _ = sequence_model(path, member.spec, member.weights, dtype="float64")
        output = sequence_output(model, member.rows)
        regression = member.spec.head[0].problem == "regression"
        expected = output.logits.squeeze(1) if regression else output.logits.argmax(dim=1)
        assert loss.predictions == pytest.approx(expected.tolist(), rel=1e-10)
        assert loss.loss_sum / loss.weight_sum == pytest.approx(float(output.loss), rel=1e-10)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_neighbours_nan_head_reaches_nobody(tiny_folder: TinyFolder, kind: str) -> None:
    path = tiny_folder(kind, "float64")
    tapped = TappedModel.load(path, dtype="float64", attention="eager")
    members = [poisoned(labelled(tapped, 0, "float64")), labelled(tapped, 1, "float64")]
    install_all(tapped, members)
    result, taps = run_segments(tapped, [member.segment() for member in members])
    assert np.isnan(result.losses[0].loss_sum)
    assert_stock(path, tapped, members[1], gradients_of(taps, 1, members[1]), "float64")


@pytest.mark.parametrize("label", [7, -1, 0.5, float("nan"), None])
def test_a_label_that_the_head_does_not_have_is_refused_and_its_neighbours_go_on(
    tiny_folder: TinyFolder, label: float | None
) -> None:
    tapped = TappedModel.load(tiny_folder("bert", "float64"), dtype="float64", attention="eager")
    members = [labelled(tapped, 0, "float64"), labelled(tapped, 1, "float64")]
    wrong = replace(members[1], rows=(replace(members[1].rows[0], label=label), members[1].rows[1]))
    install_all(tapped, members)
    segments = [members[0].segment(), replace(wrong.segment(), loss_denominator=2.0)]
    result, _ = run_segments(tapped, segments)
    assert [loss.reason for loss in result.losses] == [None, "ROW_INVALID"]


def test_rows_that_do_not_fit_the_base_model_or_the_adapter_are_refused(tiny_folder: TinyFolder) -> None:
    encoder = TappedModel.load(tiny_folder("roberta", "float64"), dtype="float64", attention="eager")
    writer = tenant(0, encoder.sites, rank=2, lengths=(8,), dtype="float64")
    typed = labelled(encoder, 1, "float64")
    typed = replace(
        typed, rows=tuple(replace(row, token_types=np.ones(len(row.tokens), np.int8)) for row in typed.rows)
    )
    longer = replace(typed, job_id="job-2", rows=(labelled_row(253, HEADS[1], seed=1, pair=False),))
    longest = replace(typed, job_id="job-3", rows=(labelled_row(252, HEADS[1], seed=1, pair=False),))
    members = [writer, typed, longer, longest]
    install_all(encoder, members)
    result, _ = run_segments(encoder, [member.segment() for member in members])
    assert [loss.reason for loss in result.losses] == ["ROW_INVALID"] * 3 + [None]
    decoder = TappedModel.load(tiny_folder("gpt2", "float64"), dtype="float64", attention="eager")
    unheaded = tenant(0, decoder.sites, rank=2, lengths=(8,), dtype="float64")
    unheaded = replace(unheaded, rows=(labelled_row(8, HEADS[0], seed=1, pair=False),))
    headed = replace(labelled(decoder, 1, "float64"), rows=(random_row(8, seed=1),))
    install_all(decoder, [unheaded, headed])
    result, _ = run_segments(decoder, [unheaded.segment(), headed.segment()])
    assert [loss.reason for loss in result.losses] == ["ROW_INVALID"] * 2


def test_an_encoder_generates_nothing(tiny_folder: TinyFolder) -> None:
    tapped = TappedModel.load(tiny_folder("bert", "float64"), dtype="float64", attention="eager")
    assert isinstance(tapped._pass.body, PatchedBody)
    with pytest.raises(InvalidInput) as caught:
        tapped.generate(None, [[1, 2]], max_new_tokens=1)
    assert caught.value.reason == "TASK_UNSUPPORTED"


def test_a_bert_without_pooler_pools_the_bare_first_token(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    from transformers import BertModel

    BertModel.from_pretrained(tiny_folder("bert", "float64"), add_pooling_layer=False).save_pretrained(
        tmp_path
    )
    bare = TappedModel.load(tmp_path, dtype="float64", attention="eager")
    whole = TappedModel.load(tiny_folder("bert", "float64"), dtype="float64", attention="eager")
    assert bare.sites == whole.sites
    losses = []
    for tapped in (bare, whole):
        member = labelled(tapped, 3, "float64")
        install_all(tapped, [member])
        result, _ = run_segments(tapped, [member.segment()], train=False)
        losses.append(result.losses[0].loss_sum)
    assert losses[0] != losses[1]


def test_an_encoder_with_missing_weights_is_refused(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny_folder("bert", "float32")
    tensors = load_file(source / "model.safetensors")
    tensors.pop("encoder.layer.1.intermediate.dense.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(InvalidInput, match=r"layer\.1\.intermediate"):
        TappedModel.load(tmp_path, dtype="float32", attention="eager")


def test_a_heads_initial_weights_depend_on_seed_and_name_alone() -> None:
    part = head_part(HeadKind(labels=3), (), hidden_size=2000)
    weights = {seed: initial_weights(AdapterSpec(parts=(part,), seed=seed)) for seed in (1, 2)}
    matrix = weights[1][TensorKey(0, TensorKind.WEIGHT)]
    assert not weights[1][TensorKey(0, TensorKind.BIAS)].any()
    assert float(matrix.std()) == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(matrix, weights[2][TensorKey(0, TensorKind.WEIGHT)])
    later = head_part(HeadKind(labels=3), tuple(part.sites), hidden_size=2000)
    again = initial_weights(AdapterSpec(parts=(later,), seed=1))
    assert torch.equal(matrix, again[TensorKey(1, TensorKind.WEIGHT)])


def test_beside_a_bfloat16_base_model_a_head_stays_float32(tiny_folder: TinyFolder) -> None:
    tapped = TappedModel.load(tiny_folder("bert", "bfloat16"), dtype="bfloat16", attention="eager")
    member = labelled(tapped, 0, "float32")
    install_all(tapped, [member])
    _, taps = run_segments(tapped, [member.segment()])
    found = gradients_of(taps, 0, member)
    expected, _ = stock_gradients(tiny_folder("bert", "float32"), member, "float32")
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    site = member.spec.head[1].index
    for kind in (TensorKind.GRAD_WEIGHT, TensorKind.GRAD_BIAS):
        key = TensorKey(site, kind)
        assert relative_difference({key: found[key]}, {key: expected[key]})[key] < 0.05
