"""Inner steps train ColA's surrogate as torch does; one inner step is the exact mode, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cola_runtime.adapter_spec import (
    AdapterPart,
    AdapterSpec,
    LinearizedLoraKind,
    LinearKind,
    LoraKind,
    MlpKind,
)
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.adapters.checkpoint_format import TrainingDefinition, decode_checkpoint
from cola_runtime.adapters.schedule import learning_rate
from cola_runtime.device.session import AdapterSession
from cola_runtime.errors import ColaError, Conflict, InvalidInput
from cola_runtime.gradients import surrogate
from cola_runtime.testing.ordinary_modules import OrdinaryAdapter
from cola_runtime.testing.peft_reference import relative_difference
from cola_runtime.types import Site, SiteKind, TensorKey, TensorKind
from tests.device.adapter_samples import SITES, definition, kinds_spec
from tests.device.test_checkpoint_format import changed

OPTIMIZERS = ["adamw", "sgd", "adafactor"]
MORE_SITES = (
    *SITES,
    Site(index=6, name="layers.1.up", kind=SiteKind.LINEAR, in_features=5, out_features=7, input_group=3),
)
Taps = dict[TensorKey, Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def every_kind(dtype: str = "float64") -> AdapterSpec:
    """A LoRA at two sites that share x, a full-rank adapter with bias, an L-LoRA; one MLP beside them."""
    parts = (
        AdapterPart(kind=LoraKind(rank=3, alpha=4.5), sites=MORE_SITES[:2]),
        AdapterPart(kind=LinearKind(bias=True, scaling=0.5), sites=(MORE_SITES[2],)),
        AdapterPart(kind=MlpKind(hidden=4, activation="gelu", scaling=2.0), sites=(MORE_SITES[3],)),
    )
    return AdapterSpec(parts=parts, seed=3, dtype=dtype)


def linearized() -> AdapterSpec:
    part = AdapterPart(kind=LinearizedLoraKind(rank=2, alpha=5.0), sites=SITES)
    return AdapterSpec(parts=(part,), seed=3, dtype="float64")


def microbatch(spec: AdapterSpec, seed: int, rows: int = 6) -> Taps:
    """One tap of every part's input group: x under its first site, a small g per site."""
    draw = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, spec.dtype)
    taps: Taps = {}
    for part in spec.parts:
        seen: set[int] = set()
        for site in part.sites:
            if site.input_group not in seen:
                key = TensorKey(site.index, TensorKind.INPUT)
                taps[key] = torch.randn(rows, site.in_features, generator=draw, dtype=dtype)
                seen.add(site.input_group)
            g = torch.randn(rows, site.out_features, generator=draw, dtype=dtype)
            taps[TensorKey(site.index, TensorKind.OUTPUT_GRADIENT)] = 0.1 * g
    return taps


def steps_of(spec: AdapterSpec, count: int) -> list[list[Taps]]:
    return [[microbatch(spec, 10 * step + part, rows=4 + part) for part in range(2)] for step in range(count)]


def train(session: AdapterSession, steps: Sequence[Sequence[Taps]]) -> None:
    for microbatches in steps:
        for taps in microbatches:
            for key, tensor in taps.items():
                session.add(key, tensor, version=session.version)
        session.apply(version=session.version)


def pairs_of(spec: AdapterSpec, microbatches: Sequence[Taps]) -> list[tuple[Site, Tensor, Tensor]]:
    pairs = []
    for taps in microbatches:
        for part in spec.parts:
            for site in part.sites:
                first = next(s for s in part.sites if s.input_group == site.input_group)
                x = taps[TensorKey(first.index, TensorKind.INPUT)]
                pairs.append((site, x, taps[TensorKey(site.index, TensorKind.OUTPUT_GRADIENT)]))
    return pairs


def surrogate_training(training: TrainingDefinition, steps: Sequence[Sequence[Taps]]) -> Taps:
    """The definition: ordinary modules, autograd of 1/2 |s a(x) - (s a0(x) - g)|^2, torch.optim."""
    spec, hyper = training.spec, training.optimizer
    modules = {
        site.index: OrdinaryAdapter(spec.kinds[site.index], site, initial_weights(spec))
        for site in spec.sites
    }
    parameters = {key: p for module in modules.values() for key, p in module.named.items()}
    optimizer = plain_optimizer(training, list(parameters.values()))
    for step, microbatches in enumerate(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(training.schedule, hyper.learning_rate, step)
        with torch.no_grad():
            targets = [(site, x, modules[site.index](x) - g) for site, x, g in pairs_of(spec, microbatches)]
        for _ in range(hyper.inner_steps):
            optimizer.zero_grad()
            loss = sum((modules[site.index](x) - target).square().sum() for site, x, target in targets)
            (0.5 * torch.as_tensor(loss)).backward()
            if hyper.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(list(parameters.values()), hyper.max_grad_norm)
            optimizer.step()
    return {key: parameter.detach() for key, parameter in parameters.items()}


def plain_optimizer(training: TrainingDefinition, parameters: list[Tensor]) -> torch.optim.Optimizer:
    hyper = training.optimizer
    decay = {"weight_decay": hyper.weight_decay}
    if hyper.kind == "adamw":
        return torch.optim.AdamW(parameters, betas=hyper.betas, eps=hyper.eps, **decay)
    if hyper.kind == "sgd":
        return torch.optim.SGD(parameters, momentum=hyper.momentum, nesterov=hyper.nesterov, **decay)
    return torch.optim.Adafactor(
        parameters, beta2_decay=hyper.beta2_decay, eps=(hyper.eps1, hyper.eps2), d=hyper.d, **decay
    )


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("inner_steps", [2, 5])
@pytest.mark.parametrize("max_grad_norm", [None, 0.3])
def test_inner_steps_train_the_surrogate_of_every_kind(
    kind: str, inner_steps: int, max_grad_norm: float | None
) -> None:
    for spec in (every_kind(), linearized()):
        training = definition(kind=kind, spec=spec, inner_steps=inner_steps, max_grad_norm=max_grad_norm)
        steps = steps_of(spec, 3)
        session = AdapterSession.create(training)
        train(session, steps)
        differences = relative_difference(session.weights(), surrogate_training(training, steps))
        assert max(differences.values()) < 1e-10
        exact = AdapterSession.create(definition(kind=kind, spec=spec, max_grad_norm=max_grad_norm))
        train(exact, steps)
        assert (
            max(relative_difference(session.weights(), exact.weights()).values()) > 1e-3
        )  # not exact, indeed


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_inner_step_is_the_exact_mode_bit_for_bit(kind: str, dtype: str) -> None:
    """A session that keeps taps and takes one step, against a session that keeps none."""
    spec = every_kind(dtype)
    steps = steps_of(spec, 3)
    exact = AdapterSession.create(definition(kind=kind, spec=spec))
    assert not holds_taps(exact, steps[0])
    train(exact, steps)
    other = AdapterSession.create(definition(kind=kind, spec=spec, inner_steps=1))
    train(other, steps)
    assert other.checkpoint() == exact.checkpoint()
    first = AdapterSession.create(definition(kind=kind, spec=spec, inner_steps=2))
    assert holds_taps(first, steps[0])
    first._more_steps = lambda count, rate, start: None  # type: ignore[method-assign]
    train(first, steps)
    assert all(torch.equal(first.weights()[key], weight) for key, weight in exact.weights().items())


def holds_taps(session: AdapterSession, microbatches: Sequence[Taps]) -> bool:
    for key, tensor in microbatches[0].items():
        session.add(key, tensor, version=0)
    held = session._accumulator._kept is not None and bool(session._accumulator._kept._pairs)
    session.discard()
    return held


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_restored_session_continues_bit_for_bit_with_its_inner_counter(kind: str) -> None:
    training = definition(kind=kind, spec=every_kind("float32"), inner_steps=3)
    steps = steps_of(training.spec, 4)
    session = AdapterSession.create(training)
    train(session, steps[:2])
    data = session.checkpoint()
    if kind != "sgd":
        assert all(state["step"] == 6 for state in decode_checkpoint(data).optimizer_state.values())
    restored = AdapterSession.restore(data)
    assert (restored.version, restored.definition) == (2, training)
    train(session, steps[2:])
    train(restored, steps[2:])
    assert restored.checkpoint() == session.checkpoint()


def test_the_schedule_ticks_once_and_the_norm_is_the_exact_gradients() -> None:
    training = definition(spec=every_kind(), inner_steps=4)
    steps = steps_of(training.spec, 3)
    session, exact = AdapterSession.create(training), AdapterSession.create(definition(spec=every_kind()))
    for step, microbatches in enumerate(steps):
        for taps in microbatches:
            for key, tensor in taps.items():
                session.add(key, tensor, version=step)
                if step == 0:
                    exact.add(key, tensor, version=0)
        applied = session.apply(version=step)
        assert applied.version == step + 1
        assert applied.learning_rate == learning_rate(training.schedule, 0.05, step)
        if step == 0:
            assert applied.gradient_norm == exact.apply(version=0).gradient_norm


def test_a_later_inner_step_that_is_not_finite_takes_the_whole_step_back() -> None:
    training = definition(kind="adamw", spec=kinds_spec(), inner_steps=3, max_grad_norm=None)
    steps = steps_of(training.spec, 2)
    session = AdapterSession.create(training)
    train(session, steps[:1])
    before = session.checkpoint()
    for key, tensor in steps[1][0].items():
        huge = 1e22 if key.kind is TensorKind.INPUT else 1e-22  # finite at first; later a(x)^2 is not
        session.add(key, tensor * huge, version=1)
    with pytest.raises(Conflict) as caught:
        session.apply(version=1)
    assert caught.value.reason == "NON_FINITE_GRADIENT"
    session.discard()
    assert session.checkpoint() == before


@pytest.mark.parametrize("kind", [TensorKind.GRAD_LORA_A, TensorKind.WEIGHT_GRADIENT])
def test_another_encoding_is_refused(kind: TensorKind) -> None:
    session = AdapterSession.create(definition(spec=every_kind(), inner_steps=2))
    shape = (3, 12) if kind is TensorKind.GRAD_LORA_A else (10, 13)
    with pytest.raises(ColaError) as caught:
        session.add(TensorKey(0, kind), torch.ones(shape, dtype=torch.float64), version=0)
    assert caught.value.reason == "INNER_STEPS_NEED_ACTIVATIONS"


def test_kept_taps_are_bounded_and_freed_with_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    training = definition(spec=every_kind(), inner_steps=2)
    taps = microbatch(training.spec, 1)
    whole = sum(tensor.nbytes for tensor in taps.values())  # x of q and k counts once
    monkeypatch.setattr(surrogate, "MAX_KEPT_BYTES", 2 * whole - 1)
    session = AdapterSession.create(training)
    for _ in range(3):
        train(session, [[taps]])
    first, *rest = taps.items()
    session.add(*first, version=3)
    for key, tensor in [*rest, *list(taps.items())[:-1]]:
        session.add(key, tensor, version=3)
    key, tensor = list(taps.items())[-1]
    with pytest.raises(ColaError) as caught:
        session.add(key, tensor, version=3)
    assert caught.value.reason == "TAPS_TOO_LARGE"
    assert (caught.value.limit, caught.value.actual) == (str(2 * whole - 1), str(2 * whole))
    assert "rows_per_step" in caught.value.remedy
    session.discard()
    train(session, [[taps]])


@pytest.mark.parametrize("inner_steps", [1, 3, 0, -2, "3", 65, 2.5])
def test_a_checkpoint_whose_counter_does_not_fit_its_inner_steps_is_refused(inner_steps: object) -> None:
    training = definition(spec=every_kind("float32"), inner_steps=2)
    session = AdapterSession.create(training)
    train(session, steps_of(training.spec, 2))
    optimizer = {name: getattr(training.optimizer, name) for name in training.optimizer.__dataclass_fields__}
    data = changed(session.checkpoint(), optimizer={**optimizer, "inner_steps": inner_steps})
    with pytest.raises(InvalidInput) as caught:
        decode_checkpoint(data)
    assert caught.value.reason == "CHECKPOINT_INVALID"
