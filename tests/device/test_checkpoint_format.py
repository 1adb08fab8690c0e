"""A checkpoint is read back exactly, and nothing that is wrong in one gets through."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
import torch

from cola_runtime.adapters.checkpoint_format import checkpoint_weights, decode_checkpoint
from cola_runtime.adapters.shapes import weight_names, weight_shapes
from cola_runtime.device.session import AdapterSession
from cola_runtime.errors import InvalidInput
from tests.device.adapter_samples import definition, gradients


@pytest.fixture
def checkpoint() -> bytes:
    session = AdapterSession.create(definition())
    for key, tensor in gradients(definition(), 1).items():
        session.add(key, tensor, version=0)
    session.apply(version=0)
    return session.checkpoint()


def metadata_of(data: bytes) -> dict[str, str]:
    header_bytes = int.from_bytes(data[:8], "little")
    fields: dict[str, str] = json.loads(data[8 : 8 + header_bytes])["__metadata__"]
    return fields


def changed(data: bytes, **description: object) -> bytes:
    fields = json.loads(metadata_of(data)["cola"]) | description
    return safetensors.numpy.save(safetensors.numpy.load(data), metadata={"cola": json.dumps(fields)})


def with_last(vector: np.ndarray, value: float) -> np.ndarray:
    changed = vector.copy()
    changed[-1] = value
    return changed


def test_weights_are_read_back_without_torch(checkpoint: bytes) -> None:
    spec, version, weights = checkpoint_weights(checkpoint)
    session = AdapterSession.restore(checkpoint)
    assert (spec, version) == (definition().spec, 1)
    for key, tensor in session.weights().items():
        assert np.array_equal(weights[key], tensor.numpy())


def test_a_checkpoint_has_every_weight_of_the_adapter_in_its_shape(checkpoint: bytes) -> None:
    spec = definition().spec
    content = decode_checkpoint(checkpoint)
    assert {key: weight.shape for key, weight in content.weights.items()} == weight_shapes(spec)
    assert list(weight_names(spec)) == list(weight_shapes(spec))
    assert len(set(weight_names(spec).values())) == len(weight_names(spec))


def test_the_optimizer_state_is_torchs_own(checkpoint: bytes) -> None:
    states = decode_checkpoint(checkpoint).optimizer_state
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in states.values())
    assert all(state["step"] == 1 for state in states.values())


def tensor_by_tensor(data: bytes) -> bytes:
    """The checkpoint as the releases before wrote it: format 2."""
    content = decode_checkpoint(data)
    tensors = {}
    for key, name in weight_names(content.definition.spec).items():
        tensors[f"weights/{name}"] = content.weights[key]
        for state, value in content.optimizer_state[key].items():
            tensors[f"optimizer/{name}/{state}"] = value
    fields = json.loads(metadata_of(data)["cola"]) | {"format": 2}
    return safetensors.numpy.save(tensors, metadata={"cola": json.dumps(fields)})


@pytest.mark.parametrize("kind", ["adamw", "sgd", "adafactor"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_checkpoint_of_the_release_before_is_gone_on_from(kind: str, steps: int) -> None:
    session = AdapterSession.create(definition(kind=kind))
    for version in range(steps):
        for key, tensor in gradients(definition(), version).items():
            session.add(key, tensor, version=version)
        session.apply(version=version)
    older = tensor_by_tensor(session.checkpoint())
    assert AdapterSession.restore(older).checkpoint() == session.checkpoint()
    spoiled = safetensors.numpy.load(older)
    name = next(name for name in spoiled if name.startswith("weights/"))
    for changes in ({name: spoiled[name][:1]}, {name: spoiled[name].astype(np.float64)}, {"odd": np.ones(2)}):
        with pytest.raises(InvalidInput):
            decode_checkpoint(safetensors.numpy.save({**spoiled, **changes}, metadata=metadata_of(older)))
    del spoiled[name]
    with pytest.raises(InvalidInput, match="missing"):
        decode_checkpoint(safetensors.numpy.save(spoiled, metadata=metadata_of(older)))


def test_the_library_reads_a_checkpoint_and_what_it_writes_is_read(checkpoint: bytes) -> None:
    tensors = safetensors.numpy.load(checkpoint)
    assert set(tensors) == {"weights", "optimizer/exp_avg", "optimizer/exp_avg_sq", "optimizer/step"}
    content = decode_checkpoint(safetensors.numpy.save(tensors, metadata=metadata_of(checkpoint)))
    assert np.array_equal(content.weights_P, tensors["weights"])
    assert all(np.array_equal(content.states[name], tensors[f"optimizer/{name}"]) for name in content.states)


def test_a_decoded_checkpoint_has_no_copy_of_its_bytes(checkpoint: bytes) -> None:
    received = memoryview(bytearray(checkpoint))
    content = decode_checkpoint(received)
    last = next(iter(content.states.values()))
    assert np.shares_memory(content.weights_P, np.frombuffer(received, np.uint8))
    assert np.shares_memory(last, np.frombuffer(received, np.uint8))


@pytest.mark.parametrize("cut", [0, 7, 8, 100, -1])
def test_a_cut_checkpoint_is_refused(checkpoint: bytes, cut: int) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode_checkpoint(checkpoint[:cut])
    assert caught.value.reason == "CHECKPOINT_INVALID"


@pytest.mark.parametrize("data", [b"", b"\xff" * 64, b"PK\x03\x04" * 8, b"\x80\x04cos\nsystem\n"])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        decode_checkpoint(data)


@pytest.mark.parametrize(
    "description",
    [
        {"format": 99},
        {"spec": {"rank": 3}},
        {"optimizer": []},
        {"version": "x"},
        {"version": -1},
        {"schedule": {"kind": "constant"}},
    ],
)
def test_metadata_that_does_not_describe_the_tensors_is_refused(
    checkpoint: bytes, description: dict[str, object]
) -> None:
    with pytest.raises(InvalidInput):
        decode_checkpoint(changed(checkpoint, **description))


def test_a_missing_additional_wrong_or_poisoned_tensor_is_refused(checkpoint: bytes) -> None:
    tensors = safetensors.numpy.load(checkpoint)
    weights_P = tensors["weights"]
    for changes in (
        {"weights": weights_P[:-1]},
        {"weights": weights_P[None]},
        {"weights": weights_P.astype(np.float64)},
        *({"weights": with_last(weights_P, poison)} for poison in (np.nan, np.inf, -np.inf)),
        {"optimizer/exp_avg": with_last(tensors["optimizer/exp_avg"], np.nan)},
        {"optimizer/step": with_last(tensors["optimizer/step"], 2.0)},
        {"weights/elsewhere/lora_A": weights_P},
    ):
        data = safetensors.numpy.save({**tensors, **changes}, metadata=metadata_of(checkpoint))
        with pytest.raises(InvalidInput):
            decode_checkpoint(data)
    del tensors["weights"]
    with pytest.raises(InvalidInput, match="missing"):
        decode_checkpoint(safetensors.numpy.save(tensors, metadata=metadata_of(checkpoint)))


def test_half_an_optimizer_state_is_refused(checkpoint: bytes) -> None:
    tensors = safetensors.numpy.load(checkpoint)
    del tensors["optimizer/exp_avg_sq"]
    with pytest.raises(InvalidInput):
        decode_checkpoint(safetensors.numpy.save(tensors, metadata=metadata_of(checkpoint)))


def test_a_negative_version_is_refused_even_of_an_optimizer_without_state() -> None:
    sgd = dataclasses.replace(definition(kind="sgd").optimizer, momentum=0.0, nesterov=False)
    data = AdapterSession.create(dataclasses.replace(definition(), optimizer=sgd)).checkpoint()
    with pytest.raises(InvalidInput):
        decode_checkpoint(changed(data, version=-1))


def test_equal_sessions_make_equal_bytes() -> None:
    torch.manual_seed(1)
    first = AdapterSession.create(definition()).checkpoint()
    torch.manual_seed(2)
    assert AdapterSession.create(definition()).checkpoint() == first
