"""A session trains as torch.optim alone does, refuses what would corrupt it, and survives a restart."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cola_runtime.adapters.checkpoint_format import TrainingDefinition, decode_checkpoint
from cola_runtime.device.session import AdapterSession
from cola_runtime.errors import ColaError, Conflict, InvalidInput
from cola_runtime.types import TensorKey, TensorKind
from tests.device.adapter_samples import SITES, definition, gradients, kinds_spec
from tests.device.reference_training import train_alone

OPTIMIZERS = ["adamw", "sgd", "adafactor"]
Steps = Sequence[Sequence[dict[TensorKey, Tensor]]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def steps_of(training: TrainingDefinition, *, count: int, microbatches: int = 2) -> Steps:
    return [[gradients(training, 100 * step + part) for part in range(microbatches)] for step in range(count)]


def train(session: AdapterSession, steps: Steps) -> None:
    for microbatches in steps:
        for tensors in microbatches:
            for key, tensor in tensors.items():
                session.add(key, tensor, version=session.version)
        session.apply(version=session.version)


def assert_same(left: dict[TensorKey, Tensor], right: dict[TensorKey, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.7, 1e6])
def test_a_session_is_bitwise_torch_optim(kind: str, dtype: str, max_grad_norm: float | None) -> None:
    training = definition(kind=kind, max_grad_norm=max_grad_norm, spec=kinds_spec(dtype))
    steps = steps_of(training, count=8)
    session = AdapterSession.create(training)
    train(session, steps)
    assert_same(session.weights(), train_alone(training, steps))


def test_a_step_reports_its_rate_and_the_norm_before_clipping() -> None:
    training = definition(max_grad_norm=1e-3)
    session = AdapterSession.create(training)
    tensors = gradients(training, 1)
    for key, tensor in tensors.items():
        session.add(key, tensor, version=0)
    applied = session.apply(version=0)
    expected = torch.stack([tensor.norm() for tensor in tensors.values()]).norm().item()
    assert applied.version == 1
    assert applied.learning_rate == pytest.approx(0.025)
    assert applied.gradient_norm == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stale", [0, 2])
def test_a_tap_of_another_version_is_refused_and_changes_nothing(stale: int) -> None:
    training = definition()
    steps = steps_of(training, count=2)
    session = AdapterSession.create(training)
    train(session, steps[:1])
    key, tensor = next(iter(gradients(training, 9).items()))
    with pytest.raises(Conflict) as caught:
        session.add(key, tensor, version=stale)
    assert caught.value.reason == "VERSION_MISMATCH"
    with pytest.raises(Conflict):
        session.apply(version=stale)
    train(session, steps[1:])
    assert_same(session.weights(), train_alone(training, steps))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_gradient_leaves_weights_and_optimizer_untouched(poison: float) -> None:
    training = definition()
    steps = steps_of(training, count=3)
    session = AdapterSession.create(training)
    train(session, steps[:2])
    before = session.checkpoint()
    for key, tensor in gradients(training, 7).items():
        session.add(key, tensor * poison, version=2)
    with pytest.raises(Conflict) as caught:
        session.apply(version=2)
    assert caught.value.reason == "NON_FINITE_GRADIENT"
    session.discard()
    assert session.checkpoint() == before
    train(session, steps[2:])
    assert_same(session.weights(), train_alone(training, steps))


def test_weights_handed_out_do_not_change_with_later_steps() -> None:
    training = definition()
    session = AdapterSession.create(training)
    handed = session.weights()
    copies = {key: tensor.clone() for key, tensor in handed.items()}
    train(session, steps_of(training, count=1))
    assert_same(handed, copies)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_restored_session_continues_bit_for_bit(kind: str, at: int) -> None:
    training = definition(kind=kind, spec=kinds_spec())
    steps = steps_of(training, count=6)
    session = AdapterSession.create(training)
    train(session, steps[:at])
    data = session.checkpoint()
    restored = AdapterSession.restore(data)
    assert restored.version == at
    assert restored.definition == training
    assert restored.checkpoint() == data
    train(session, steps[at:])
    train(restored, steps[at:])
    assert_same(restored.weights(), session.weights())
    assert restored.checkpoint() == session.checkpoint()


def test_a_checkpoint_in_the_middle_of_a_step_holds_the_last_version() -> None:
    training = definition()
    session = AdapterSession.create(training)
    before = session.checkpoint()
    for key, tensor in gradients(training, 3).items():
        session.add(key, tensor, version=0)
    assert session.checkpoint() == before


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(InvalidInput, match="adamw, sgd or adafactor"):
        AdapterSession.create(definition(kind="lion"))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_resident_bytes_are_what_the_tensors_take(kind: str, dtype: str) -> None:
    training = definition(kind=kind, spec=kinds_spec(dtype))
    session = AdapterSession.create(training)
    train(session, steps_of(training, count=1))
    states = decode_checkpoint(session.checkpoint()).optimizer_state.values()
    held = sum(array.nbytes for state in states for array in state.values())
    weights = sum(tensor.nbytes for tensor in session.weights().values())
    assert session.resident_bytes == 2 * weights + held


def test_adafactor_remembers_rows_and_columns_of_a_matrix_and_every_entry_of_a_vector() -> None:
    training = definition(kind="adafactor", spec=kinds_spec())
    session = AdapterSession.create(training)
    train(session, steps_of(training, count=1))
    states = decode_checkpoint(session.checkpoint()).optimizer_state
    shapes = {name: state.shape for name, state in states[TensorKey(1, TensorKind.WEIGHT)].items()}
    assert shapes == {"row_var": (6, 1), "col_var": (1, 12), "step": ()}
    shapes = {name: state.shape for name, state in states[TensorKey(1, TensorKind.BIAS)].items()}
    assert shapes == {"variance": (6,), "step": ()}


def test_a_tap_that_does_not_fit_is_a_protocol_error() -> None:
    session = AdapterSession.create(definition())
    with pytest.raises(ColaError) as caught:
        session.add(TensorKey(0, TensorKind.GRAD_LORA_A), torch.ones(2, 2), version=0)
    assert caught.value.reason == "TENSOR_INVALID"


def test_with_staleness_a_tap_of_the_version_before_trains_the_present_one() -> None:
    training = definition()
    steps = steps_of(training, count=2, microbatches=1)
    session = AdapterSession.create(training, max_staleness=1)
    train(session, steps[:1])
    for key, tensor in steps[1][0].items():
        session.add(key, tensor, version=0)
    with pytest.raises(Conflict) as caught:
        session.apply(version=0)
    assert caught.value.reason == "VERSION_MISMATCH"
    session.apply(version=1)
    assert_same(session.weights(), train_alone(training, steps))
    for version in (0, 3):
        with pytest.raises(Conflict):
            session.add(key, tensor, version=version)


def test_a_stale_tap_is_taken_at_the_weights_of_its_version() -> None:
    training = definition(dtype="float64", sites=SITES[2:])
    session = AdapterSession.create(training, max_staleness=1)
    train(session, steps_of(training, count=1))
    before = session.weights()
    train(session, steps_of(training, count=1))
    x_NI, grad_NO = (torch.randn(4, width, dtype=torch.float64) for width in (9, 20))
    twin = AdapterSession(training, before, version=1)
    for each in (session, twin):
        each.add(TensorKey(4, TensorKind.INPUT), x_NI, version=1)
        each.add(TensorKey(4, TensorKind.OUTPUT_GRADIENT), grad_NO, version=1)
    applied, expected = session.apply(version=2), twin.apply(version=1)
    assert applied.gradient_norm == expected.gradient_norm
    states = decode_checkpoint(session.checkpoint()).optimizer_state.values()
    held = sum(array.nbytes for state in states for array in state.values())
    # the weights, those of the version before, and the gradient sums
    assert session.resident_bytes == 3 * sum(tensor.nbytes for tensor in before.values()) + held


def test_a_restored_session_has_no_version_before() -> None:
    training = definition()
    session = AdapterSession.create(training, max_staleness=1)
    train(session, steps_of(training, count=1))
    restored = AdapterSession.restore(session.checkpoint(), max_staleness=1)
    key, tensor = next(iter(gradients(training, 9).items()))
    with pytest.raises(Conflict):
        restored.add(key, tensor, version=0)
