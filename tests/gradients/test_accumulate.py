import itertools
import random
import weakref

import pytest
import torch

from cola_runtime.adapter_spec import lora_spec
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.errors import ProtocolError
from cola_runtime.gradients.accumulate import GradientAccumulator
from cola_runtime.testing.tiny_models import tiny_sites
from cola_runtime.types import TensorKey, TensorKind

torch.set_num_threads(1)
INPUT, GRADIENT = TensorKind.INPUT, TensorKind.OUTPUT_GRADIENT
Q, K, V, O = tiny_sites("llama")[:4]  # noqa: E741


def make_spec(sites=(Q, K, V, O), dtype="float64", rank=3):
    return lora_spec(rank=rank, alpha=5.0, use_rslora=True, seed=2, sites=sites, dtype=dtype)


def random_weights(spec):
    draw = torch.Generator().manual_seed(5)
    return {
        key: torch.randn(weight.shape, generator=draw, dtype=weight.dtype)
        for key, weight in initial_weights(spec).items()
    }


def one_tap(spec, rows=4, seed=0, dtype=torch.float64):
    """x of each input group under its first adapted site, and g of each site."""
    draw = torch.Generator().manual_seed(seed)
    tap = {}
    first_of_group = {}
    for site in spec.sites:
        first = first_of_group.setdefault(site.input_group, site)
        if first is site:
            tap[TensorKey(site.index, INPUT)] = torch.randn(rows, site.in_features, generator=draw).to(dtype)
        tap[TensorKey(site.index, GRADIENT)] = torch.randn(rows, site.out_features, generator=draw).to(dtype)
    return tap


def expected_gradients(spec, taps, weights):
    """Straight from LoRA's formula, all in float64."""
    totals = {}
    for tap in taps:
        for site in spec.sites:
            first = next(s for s in spec.sites if s.input_group == site.input_group)
            a, b = (weights[TensorKey(site.index, kind)] for kind in (TensorKind.LORA_A, TensorKind.LORA_B))
            x, g = tap[TensorKey(first.index, INPUT)], tap[TensorKey(site.index, GRADIENT)]
            x, g, a, b, s = x.double(), g.double(), a.double(), b.double(), spec.parts[0].kind.scaling
            pair = s * (g @ b).T @ x, s * g.T @ (x @ a.T)
            for kind, gradient in zip((TensorKind.GRAD_LORA_A, TensorKind.GRAD_LORA_B), pair, strict=True):
                key = TensorKey(site.index, kind)
                totals[key] = totals.get(key, 0) + gradient
    return totals


def add_all(accumulator, tensors, weights):
    for key, tensor in tensors:
        accumulator.add(key, tensor, weights)


def test_activations_of_several_microbatches_give_the_summed_gradient():
    spec = make_spec(sites=tiny_sites("gpt2"))
    weights = random_weights(spec)
    taps = [one_tap(spec, rows=rows, seed=rows) for rows in (4, 1, 7)]
    accumulator = GradientAccumulator(spec)
    for tap in taps:
        add_all(accumulator, tap.items(), weights)
        assert accumulator.complete
    expected = expected_gradients(spec, taps, weights)
    gradients = accumulator.gradients()
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-12, atol=1e-12)


def test_the_order_within_a_tap_does_not_matter():
    spec = make_spec(sites=(Q, K, V))
    weights = random_weights(spec)
    tap = one_tap(spec)
    expected = expected_gradients(spec, [tap, tap], weights)
    for order in itertools.permutations(tap.items()):
        accumulator = GradientAccumulator(spec)
        for _ in range(2):
            for number, (key, tensor) in enumerate(order):
                assert accumulator.complete is (number == 0)
                accumulator.add(key, tensor, weights)
        for key, gradient in accumulator.gradients().items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-12, atol=1e-12)


def test_both_encodings_give_the_same_gradient():
    spec = make_spec()
    weights = random_weights(spec)
    by_activations, by_gradient = GradientAccumulator(spec), GradientAccumulator(spec)
    for microbatch in range(2):
        tap = one_tap(spec, seed=microbatch)
        add_all(by_activations, tap.items(), weights)
        encoded = list(expected_gradients(spec, [tap], weights).items())
        random.Random(microbatch).shuffle(encoded)
        add_all(by_gradient, encoded, weights)
    for key, gradient in by_gradient.gradients().items():
        torch.testing.assert_close(by_activations.gradients()[key], gradient, rtol=1e-12, atol=1e-12)


def at_offset(tensor, numbers):
    """A copy that begins so many numbers behind a multiple of 64 bytes."""
    memory = torch.empty(tensor.numel() + 32, dtype=tensor.dtype)
    first = -memory.data_ptr() % 64 // tensor.itemsize + numbers
    return memory[first : first + tensor.numel()].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("encoding", ["activations", "weight_gradient"])
def test_gradients_do_not_depend_on_where_in_memory_the_taps_lie(encoding):
    """On some processors a product's last bits do; two devices must agree, and a device with its replay."""
    spec = make_spec(dtype="float32")
    weights = random_weights(spec)
    tap = one_tap(spec, rows=37, dtype=torch.float32)
    if encoding == "weight_gradient":
        tap = {
            TensorKey(site.index, TensorKind.WEIGHT_GRADIENT): torch.randn(
                site.out_features, site.in_features + 1
            )
            for site in spec.sites
        }
    found = []
    for offset in range(16):
        accumulator = GradientAccumulator(spec)
        add_all(accumulator, ((key, at_offset(tensor, offset)) for key, tensor in tap.items()), weights)
        found.append(accumulator.gradient_vector().clone())
    assert found[0].any()
    assert all(torch.equal(gradient_P, found[0]) for gradient_P in found[1:])


def test_bfloat16_taps_are_widened_before_they_are_multiplied():
    spec = make_spec(dtype="float32")
    weights = random_weights(spec)
    tap = one_tap(spec, rows=64, dtype=torch.bfloat16)
    accumulator = GradientAccumulator(spec)
    add_all(accumulator, tap.items(), weights)
    expected = expected_gradients(spec, [tap], weights)
    for key, gradient in accumulator.gradients().items():
        assert gradient.dtype == torch.float32
        difference = (gradient.double() - expected[key]).norm() / expected[key].norm()
        assert difference < 1e-6


def test_input_is_keyed_by_the_first_adapted_site_of_its_group():
    spec = make_spec(sites=(K, V))
    weights = random_weights(spec)
    accumulator = GradientAccumulator(spec)
    tap = one_tap(spec)
    assert TensorKey(K.index, INPUT) in tap
    add_all(accumulator, tap.items(), weights)
    assert accumulator.complete
    with pytest.raises(ProtocolError, match=r"first site .*k_proj"):
        accumulator.add(TensorKey(V.index, INPUT), tap[TensorKey(K.index, INPUT)], weights)


def test_pairs_are_consumed_at_once_and_freed():
    spec = make_spec(sites=(Q, K, V))
    weights = random_weights(spec)
    accumulator = GradientAccumulator(spec)
    tap = one_tap(spec)
    x = tap.pop(TensorKey(Q.index, INPUT))
    alive_x = weakref.ref(x)
    accumulator.add(TensorKey(Q.index, INPUT), x, weights)
    del x
    while tap:
        assert alive_x() is not None
        key, g = tap.popitem()
        accumulator.add(key, g, weights)
        alive_g = weakref.ref(g)
        del g
        assert alive_g() is None
    assert alive_x() is None


def test_gradients_that_came_before_their_input_are_freed_when_it_comes():
    spec = make_spec(sites=(Q, K, V))
    weights = random_weights(spec)
    accumulator = GradientAccumulator(spec)
    tap = one_tap(spec)
    early = tap.pop(TensorKey(K.index, GRADIENT))
    alive = weakref.ref(early)
    accumulator.add(TensorKey(K.index, GRADIENT), early, weights)
    del early
    assert alive() is not None
    accumulator.add(TensorKey(Q.index, INPUT), tap[TensorKey(Q.index, INPUT)], weights)
    assert alive() is None


def test_an_open_pair_keeps_the_gradients_back_and_clear_drops_it():
    spec = make_spec()
    weights = random_weights(spec)
    accumulator = GradientAccumulator(spec)
    tap = one_tap(spec)
    late = TensorKey(O.index, GRADIENT)
    add_all(accumulator, [(k, t) for k, t in tap.items() if k != late], weights)
    assert not accumulator.complete
    with pytest.raises(ProtocolError, match="o_proj") as caught:
        accumulator.gradients()
    assert caught.value.reason == "TAP_INCOMPLETE"
    accumulator.clear()
    accumulator.add(late, tap[late], weights)
    assert not accumulator.complete
    accumulator.clear()
    assert accumulator.complete
    assert not any(gradient.any() for gradient in accumulator.gradients().values())
    add_all(accumulator, tap.items(), weights)
    assert all(gradient.any() for gradient in accumulator.gradients().values())


def test_without_taps_and_with_no_rows_the_gradient_is_zero():
    spec = make_spec()
    accumulator = GradientAccumulator(spec)
    add_all(accumulator, one_tap(spec, rows=0).items(), random_weights(spec))
    assert accumulator.complete
    assert len(accumulator.gradients()) == 8
    assert not any(gradient.any() for gradient in accumulator.gradients().values())


def shaped(*shape, dtype=torch.float64):
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        (TensorKey(99, INPUT), shaped(4, 64), "expects one of sites [0, 1, 2, 3], got site 99"),
        (TensorKey(0, TensorKind.LORA_A), shaped(3, 64), "got LORA_A"),
        (TensorKey(0, TensorKind.BLOB), shaped(3), "got BLOB"),
        (TensorKey(0, INPUT), shaped(4, 63), "q_proj' expects shape (4, 64), got (4, 63)"),
        (TensorKey(0, INPUT), shaped(64), "expects shape (rows, 64), got (64,)"),
        (TensorKey(0, INPUT), shaped(4, 64, dtype=torch.int64), "expects a floating point dtype"),
        (TensorKey(1, GRADIENT), shaped(4, 64), "k_proj' expects shape (4, 32), got (4, 64)"),
        (TensorKey(0, TensorKind.GRAD_LORA_A), shaped(64, 3), "expects shape (3, 64), got (64, 3)"),
        (TensorKey(1, TensorKind.GRAD_LORA_B), shaped(64, 3), "expects shape (32, 3), got (64, 3)"),
        (
            TensorKey(0, TensorKind.GRAD_LORA_A),
            shaped(3, 64, dtype=torch.float32),
            "expects torch.float64, got torch.float32",
        ),
    ],
)
def test_a_tensor_that_does_not_belong_is_refused_and_changes_nothing(key, tensor, message):
    spec = make_spec()
    accumulator = GradientAccumulator(spec)
    with pytest.raises(ProtocolError) as caught:
        accumulator.add(key, tensor, random_weights(spec))
    assert caught.value.reason == "TENSOR_INVALID"
    assert message in str(caught.value)
    assert accumulator.complete
    assert not any(gradient.any() for gradient in accumulator.gradients().values())


@pytest.mark.parametrize("input_first", [True, False])
def test_a_tap_is_one_input_and_one_gradient_a_site_with_the_same_rows(input_first):
    spec = make_spec()
    weights = random_weights(spec)
    accumulator = GradientAccumulator(spec)
    first, second = TensorKey(0, INPUT), TensorKey(1, GRADIENT)
    sizes = {first: 64, second: 32}
    if not input_first:
        first, second = second, first
    accumulator.add(first, shaped(4, sizes[first]), weights)
    with pytest.raises(ProtocolError, match="a second"):
        accumulator.add(first, shaped(4, sizes[first]), weights)
    with pytest.raises(ProtocolError, match=r"expects shape \(4, "):
        accumulator.add(second, shaped(5, sizes[second]), weights)
    accumulator.add(second, shaped(4, sizes[second]), weights)
    with pytest.raises(ProtocolError, match="a second"):
        accumulator.add(second, shaped(4, sizes[second]), weights)
