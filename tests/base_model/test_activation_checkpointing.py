"""Layers that are computed again in the backward pass: the same taps, each once, for less memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from cola_runtime.adapter_spec import AdapterSpec, HeadKind, LoraKind, head_part
from cola_runtime.base_model import checkpointing
from cola_runtime.base_model.model import TappedModel
from cola_runtime.encodings import Encoding
from cola_runtime.errors import InvalidInput
from cola_runtime.gradients.taps import Tap
from cola_runtime.rows import Row
from cola_runtime.testing.architectures import save_causal_model, save_encoder_decoder
from cola_runtime.testing.live_bytes import LiveBytes
from cola_runtime.testing.tiny_models import save_tiny_model
from cola_runtime.types import BaseStep, Gang, Membership
from tests.base_model.kind_samples import everywhere, mixed_kinds, random_weights
from tests.base_model.mixed_samples import Tenant, install_all, run_segments
from tests.base_model.mixed_samples import tenant as lora_tenant

CELLS = [
    *((architecture, encoding) for architecture in ("llama", "gpt2") for encoding in Encoding),
    ("bert", Encoding.ADAPTER_GRADIENT),
    ("t5", Encoding.ACTIVATIONS),
    ("bart", Encoding.WEIGHT_GRADIENT),
]
ModelFolder = Callable[[str], Path]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            save = save_encoder_decoder if name in ("t5", "bart") else save_tiny_model
            made[name] = save(name, tmp_path_factory.mktemp(name), dtype="float64")
        return made[name]

    return folder


def loaded(path: Path, *, checkpointing: bool, **options: str) -> TappedModel:
    # Among encoder-decoders "auto" is fixed; elsewhere it is whatever is faster at that moment.
    attention = "auto" if path.name.startswith(("t5", "bart")) else "sdpa"
    return TappedModel.load(
        path, dtype="float64", attention=attention, activation_checkpointing=checkpointing, **options
    )


def tenants_of(model: TappedModel, encoding: Encoding) -> tuple[list[Tenant], list[Encoding]]:
    """Every kind at every site, LoRA with dropout, and LoRA at the upper half of the sites."""
    members, encodings = mixed_kinds(model.sites, encoding, "float64")
    dropping = replace(
        everywhere(20, LoraKind(rank=2, alpha=4.0, dropout=0.4), model.sites, "float64"), job_id="job-drops"
    )
    half = model.sites[len(model.sites) // 2 :]
    members.append(lora_tenant(21, half, rank=3, lengths=(7, 11), dtype="float64"))
    members.append(dropping)
    encodings += [encoding] * (len(members) - len(encodings))
    return [fitting(model, member) for member in members], encodings


def fitting(model: TappedModel, member: Tenant) -> Tenant:
    """With a head and labels for an encoder, with sources for an encoder-decoder."""
    description = model.describe("", "")
    if not description.bidirectional:
        return replace(
            member,
            rows=tuple(
                with_source(row) if "sequence_to_sequence" in description.tasks else row
                for row in member.rows
            ),
        )
    head = head_part(HeadKind(labels=3), model.catalogue, hidden_size=description.hidden_size)
    spec = AdapterSpec(parts=(*member.spec.parts, head), seed=member.spec.seed, dtype=member.spec.dtype)
    nothing = np.zeros(0, np.float32)
    rows = tuple(replace(row, weights=nothing, label=len(row.tokens) % 3) for row in member.rows)
    return replace(member, spec=spec, weights=random_weights(spec), rows=rows)


def with_source(row: Row) -> Row:
    draw = np.random.default_rng(len(row.tokens))
    return replace(row, source=draw.integers(5, 250, 4 + len(row.tokens) % 5, dtype=np.int32))


def assert_same(found: list[Tap], expected: list[Tap]) -> None:
    """As many taps, of the same segments and tensors in the same order, each within 1e-10."""
    assert [(tap.segment, list(tap.tensors)) for tap in found] == [
        (tap.segment, list(tap.tensors)) for tap in expected
    ]
    for mine, theirs in zip(found, expected, strict=True):
        for key, tensor in theirs.tensors.items():
            assert mine.tensors[key].shape == tensor.shape
            difference = float((mine.tensors[key] - tensor).abs().max()) if tensor.numel() else 0.0
            assert difference <= 1e-10 * float(tensor.abs().max() if tensor.numel() else 1), key


@pytest.mark.parametrize(("architecture", "encoding"), CELLS)
def test_every_tap_leaves_once_and_is_that_of_the_plain_pass(
    model_folder: ModelFolder, architecture: str, encoding: Encoding
) -> None:
    path = model_folder(architecture)
    results = []
    for checkpointing_on in (False, True):
        model = loaded(path, checkpointing=checkpointing_on)
        members, encodings = tenants_of(model, encoding)
        install_all(model, members)
        segments = [member.segment(each) for member, each in zip(members, encodings, strict=True)]
        results.append(run_segments(model, segments))
    (plain, plain_taps), (again, again_taps) = results
    assert [loss.loss_sum for loss in again.losses] == [loss.loss_sum for loss in plain.losses]
    assert_same(again_taps, plain_taps)
    assert_same(run_segments(model, segments)[1], plain_taps)  # a step leaves nothing behind


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merged_weights_and_their_biases_are_added_once(model_folder: ModelFolder, architecture: str) -> None:
    results = []
    for checkpointing_on in (False, True):
        model = loaded(model_folder(architecture), checkpointing=checkpointing_on)
        members, _ = mixed_kinds(model.sites, Encoding.ACTIVATIONS, "float64")
        member = members[3]  # linear with a bias
        gang = Gang(name="group/somebody-and-nobody-else", combine="sum")
        model.install(member.lease, member.spec, 0, member.weights, membership=Membership(gang=gang))
        results.append(run_segments(model, [replace(member.segment(Encoding.ACTIVATIONS), gang=gang)])[1])
    assert_same(results[1], results[0])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_layer_more_keeps_one_tensor_more(tmp_path: Path, architecture: str) -> None:
    """Of the most that lives at once in a whole training step, adapters' weights included. On a processor:
    of a CUDA device taps under way count as well, for as long as their thread is behind.
    """
    rows, length, hidden = 4, 64, 64
    one_tensor = rows * length * hidden * 8
    most = {}
    for layers in (4, 8):
        path = save_causal_model(
            architecture, tmp_path / str(layers), dtype="float64", num_hidden_layers=layers, n_layer=layers
        )
        model = loaded(path, checkpointing=True, accelerator="cpu")
        member = lora_tenant(0, model.sites, rank=2, lengths=(length,) * rows, dtype="float64")
        install_all(model, [member])
        with LiveBytes() as counted:
            model.run(BaseStep(number=1, segments=(member.segment(),)), lambda tap: None)
        most[layers] = counted.peak
    assert one_tensor <= (most[8] - most[4]) / 4 < 1.25 * one_tensor


def test_rows_without_gradients_compute_no_layer_twice(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(model_folder("gpt2"), checkpointing=True)
    members, _ = tenants_of(model, Encoding.ADAPTER_GRADIENT)
    install_all(model, members)
    monkeypatch.setattr(checkpointing, "checkpoint", None)  # calling it would fail
    step = BaseStep(number=1, segments=tuple(member.segment() for member in members), train=False)
    result = model.run(step, lambda tap: None)
    assert all(loss.reason is None for loss in result.losses)
    assert len(model.generate("job-0", [[5, 6, 7]], max_new_tokens=2)[0]) == 2


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(InvalidInput) as caught:
        checkpointing.checkpoint_layers(nn.Sequential(nn.Linear(2, 2)), [])
    assert caught.value.reason == "CHECKPOINTING_UNSUPPORTED"


def test_it_is_off_unless_asked_for_and_says_so(model_folder: ModelFolder) -> None:
    for wanted, told in ((False, "off"), (True, "on")):
        description = loaded(model_folder("llama"), checkpointing=wanted).describe("", "")
        assert description.details["activation_checkpointing"] == told
