import dataclasses

import pytest
import torch

from cola_runtime.adapter_spec import AdapterSpec, LoraKind, lora_spec
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.adapters.lora import SiteLora
from cola_runtime.testing.tiny_models import tiny_sites
from cola_runtime.types import Site, SiteKind, TensorKey, TensorKind

torch.set_num_threads(1)


def make_spec(**changes: object) -> AdapterSpec:
    fields = {"rank": 4, "alpha": 6.0, "use_rslora": False, "seed": 7, "sites": tiny_sites("llama")}
    return lora_spec(**{**fields, **changes})


def random_problem(rows: int = 5, rank: int = 3) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(rows * 10 + rank)
    shapes = ((rows, 6), (rows, 7), (rank, 6), (7, rank))
    return tuple(torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)


def lora_gradient(x, grad, a, b, scaling):
    """`SiteLora.gradient` at a site of the factors' shapes."""
    site = Site(index=0, name="q", kind=SiteKind.LINEAR, in_features=6, out_features=7, input_group=0)
    kind = LoraKind(rank=len(a), alpha=scaling * len(a))
    keys = TensorKey(0, TensorKind.LORA_A), TensorKey(0, TensorKind.LORA_B)
    gradients = SiteLora(kind, site).gradient(x, grad, dict(zip(keys, (a, b), strict=True)))
    return tuple(gradients[key] for key in keys)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_gradient_is_autograds_with_the_scaling_exactly_once(rows, rank, use_rslora):
    x, grad, a, b = random_problem(rows, rank)
    spec = make_spec(rank=rank, use_rslora=use_rslora)
    scaling = 6.0 / rank**0.5 if use_rslora else 6.0 / rank
    a.requires_grad_()
    b.requires_grad_()
    (scaling * x @ a.T @ b.T).backward(grad)
    ours = lora_gradient(x, grad, a.detach(), b.detach(), spec.parts[0].kind.scaling)
    torch.testing.assert_close(ours, (a.grad, b.grad), rtol=1e-13, atol=1e-13)


def test_gradient_matches_finite_differences():
    x, grad, a, b = random_problem()
    grad_a, grad_b = lora_gradient(x, grad, a, b, 0.5)
    for factor, gradient in ((a, grad_a), (b, grad_b)):
        for place in [(0, 0), (2, 1), (1, 2)]:
            losses = []
            for step in (1e-6, -1e-6):
                kept = factor[place].item()
                factor[place] += step
                losses.append((0.5 * (x @ a.T @ b.T) * grad).sum().item())
                factor[place] = kept
            assert gradient[place].item() == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-7)


def test_gradient_sums_over_rows():
    x, grad, a, b = random_problem(rows=6)
    whole = lora_gradient(x, grad, a, b, 1.5)
    halves = [lora_gradient(x[rows], grad[rows], a, b, 1.5) for rows in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(whole, tuple(p + q for p, q in zip(*halves, strict=True)))


def test_initial_adapter_changes_nothing_and_has_pefts_range():
    spec = make_spec()
    weights = initial_weights(spec)
    assert len(weights) == 2 * len(spec.sites)
    for site in spec.sites:
        a = weights[TensorKey(site.index, TensorKind.LORA_A)]
        b = weights[TensorKey(site.index, TensorKind.LORA_B)]
        assert a.shape == (4, site.in_features)
        assert b.shape == (site.out_features, 4)
        assert not b.any()
        bound = site.in_features**-0.5
        assert 0.95 * bound < a.abs().max() <= bound
        assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_initial_weights_of_a_site_do_not_depend_on_the_other_sites():
    sites = tiny_sites("llama")
    everywhere = initial_weights(make_spec())
    some = initial_weights(make_spec(sites=(sites[9], sites[2])))
    for key, weight in some.items():
        assert torch.equal(weight, everywhere[key])


def test_initial_weights_depend_on_the_sites_name_and_not_on_its_index():
    site = tiny_sites("llama")[3]
    first = initial_weights(make_spec(sites=(site,)))
    moved = initial_weights(make_spec(sites=(dataclasses.replace(site, index=40),)))
    renamed = initial_weights(make_spec(sites=(dataclasses.replace(site, name="other"),)))
    key, moved_key = TensorKey(3, TensorKind.LORA_A), TensorKey(40, TensorKind.LORA_A)
    assert torch.equal(first[key], moved[moved_key])
    assert not torch.equal(first[key], renamed[key])


@pytest.mark.parametrize("other_seed", [8, 7 + 2**32])
def test_every_bit_of_the_seed_counts(other_seed):
    key = TensorKey(0, TensorKind.LORA_A)
    assert torch.equal(initial_weights(make_spec())[key], initial_weights(make_spec())[key])
    assert not torch.equal(
        initial_weights(make_spec())[key], initial_weights(make_spec(seed=other_seed))[key]
    )


def test_float32_and_float64_adapters_of_one_seed_agree_to_rounding():
    wide = initial_weights(make_spec(dtype="float64"))
    narrow = initial_weights(make_spec())
    for key, weight in narrow.items():
        assert weight.dtype == torch.float32
        assert wide[key].dtype == torch.float64
        assert torch.equal(wide[key].float(), weight)


def test_initial_weights_leave_torchs_global_generator_alone():
    before = torch.get_rng_state()
    initial_weights(make_spec())
    assert torch.equal(before, torch.get_rng_state())
