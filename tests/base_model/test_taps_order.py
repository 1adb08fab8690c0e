"""What the taps hold, in which order they come, and what is not computed for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cola_runtime.base_model.model import TappedModel
from cola_runtime.encodings import Encoding, TapPlan
from cola_runtime.gradients.taps import Tap
from cola_runtime.rows import Row
from cola_runtime.types import BaseStep, Segment, Site, TensorKind
from tests.base_model.conftest import TinyFolder
from tests.base_model.mixed_samples import four_tenants, install_all, run_segments, tenant

KINDS = ["llama", "gpt2"]
SHAPE: dict[str, Any] = {"rank": 4, "lengths": (12, 9), "dtype": "float32"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmm_", "baddbmm_", "_linear_pointwise"}


class CountedProducts(TorchDispatchMode):
    """Counts matrix products while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in PRODUCTS
        return func(*args, **(kwargs or {}))


def loaded(tiny_folder: TinyFolder, kind: str) -> TappedModel:
    return TappedModel.load(tiny_folder(kind, "float32"), dtype="float32", attention="eager", threads=1)


def early_label_row() -> Row:
    """20 tokens, of which only the first six are predicted."""
    weights = np.zeros(20, np.float32)
    weights[1:7] = 1.0
    return Row(tokens=np.arange(30, 50, dtype=np.int32), weights=weights)


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize("kind", KINDS)
def test_taps_come_deepest_input_group_first_one_per_segment_and_pass(
    tiny_folder: TinyFolder, kind: str, encoding: Encoding
) -> None:
    model = loaded(tiny_folder, kind)
    tenants = four_tenants(model.sites, "float32")
    install_all(model, tenants)
    _, taps = run_segments(model, [member.segment(encoding) for member in tenants])
    for position, member in enumerate(tenants):
        groups = [
            model.sites[next(iter(tap.tensors)).site].input_group for tap in taps if tap.segment == position
        ]
        expected = sorted({site.input_group for site in member.spec.sites}, reverse=True)
        several = (
            kind == "gpt2"
            and encoding is Encoding.ACTIVATIONS
            and len({row.length for row in member.rows}) > 1
        )
        assert groups == expected * (2 if several else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_taps_are_contiguous_and_outlive_later_steps(tiny_folder: TinyFolder, kind: str) -> None:
    model = loaded(tiny_folder, kind)
    tenants = four_tenants(model.sites, "float32")
    install_all(model, tenants)
    segments = [member.segment(list(Encoding)[k % 2]) for k, member in enumerate(tenants)]
    _, taps = run_segments(model, segments)
    kept = [{key: tensor.clone() for key, tensor in tap.tensors.items()} for tap in taps]
    run_segments(model, segments[::-1])
    for tap, copies in zip(taps, kept, strict=True):
        for key, tensor in tap.tensors.items():
            assert tensor.is_contiguous()
            assert torch.equal(tensor, copies[key])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_reach_no_loss_are_dropped(tiny_folder: TinyFolder, kind: str) -> None:
    model = loaded(tiny_folder, kind)
    member = tenant(0, model.sites, rank=4, lengths=(25,), dtype="float32")
    install_all(model, [member])
    segment = Segment(
        lease=member.lease,
        version=0,
        rows=(early_label_row(), early_label_row()),
        loss_denominator=12.0,
        taps=TapPlan(Encoding.ACTIVATIONS),
    )
    _, taps = run_segments(model, [segment])
    for tap in taps:
        shapes = {tensor.shape[0] for tensor in tap.tensors.values()}
        assert shapes == {12}  # two rows of six predicting positions; causal attention uses no later one


@pytest.mark.parametrize("kind", KINDS)
def test_a_segment_without_labels_sends_no_activation_rows(tiny_folder: TinyFolder, kind: str) -> None:
    model = loaded(tiny_folder, kind)
    members = four_tenants(model.sites, "float32")[:2]
    install_all(model, members)
    silent = Row(tokens=np.arange(30, 40, dtype=np.int32), weights=np.zeros(10, np.float32))
    segment = Segment(
        lease=members[0].lease,
        version=0,
        rows=(silent,),
        loss_denominator=1.0,
        taps=TapPlan(Encoding.ACTIVATIONS),
    )
    result, taps = run_segments(model, [segment, members[1].segment()])
    assert result.losses[0].weight_sum == 0.0
    assert {len(t) for tap in taps if tap.segment == 0 for t in tap.tensors.values()} == {0}


@pytest.mark.parametrize("kind", KINDS)
def test_x_travels_once_per_input_group_under_its_first_adapted_site(
    tiny_folder: TinyFolder, kind: str
) -> None:
    model = loaded(tiny_folder, kind)
    chosen = tuple(site for site in model.sites if not site.name.endswith(("q_proj", "c_fc")))
    member = tenant(0, chosen, rank=4, lengths=(12,), dtype="float32")
    install_all(model, [member])
    _, taps = run_segments(model, [member.segment(Encoding.ACTIVATIONS)])
    firsts: dict[int, int] = {}
    for site in chosen:
        firsts.setdefault(site.input_group, site.index)
    inputs = [key.site for tap in taps for key in tap.tensors if key.kind is TensorKind.INPUT]
    grads = [key.site for tap in taps for key in tap.tensors if key.kind is TensorKind.OUTPUT_GRADIENT]
    assert sorted(inputs) == sorted(firsts.values())
    assert sorted(grads) == [site.index for site in chosen]


def products_of(model: TappedModel, sites: tuple[Site, ...]) -> tuple[int, int]:
    """Matrix products of a step with an adapter at `sites`: until the last tap, and in all."""
    member = tenant(0, sites, **SHAPE)
    install_all(model, [member])
    until_last_tap = 0
    with CountedProducts() as products:

        def sink(_tap: Tap) -> None:
            nonlocal until_last_tap
            until_last_tap = products.count

        model.run(BaseStep(number=1, segments=(member.segment(),)), sink)
    return until_last_tap, products.count


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_computed_below_the_lowest_adapted_site(tiny_folder: TinyFolder, kind: str) -> None:
    model = loaded(tiny_folder, kind)
    deepest_first = [products_of(model, (site,)) for site in reversed(model.sites)]
    assert all(until_last_tap == total for until_last_tap, total in deepest_first)
    totals = [total for _, total in deepest_first]
    assert totals == sorted(totals)
    assert totals[0] < totals[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_at_the_last_site_costs_no_product_with_a_base_weight_in_backward(
    tiny_folder: TinyFolder, kind: str
) -> None:
    model = loaded(tiny_folder, kind)
    trained = products_of(model, model.sites[-1:])[1]
    with CountedProducts() as forward_only:
        run_segments(model, [tenant(0, model.sites[-1:], **SHAPE).segment()], train=False)
    assert trained - forward_only.count == 1 + 3  # the head's, then g B, dA and dB


@pytest.mark.parametrize("kind", KINDS)
def test_base_weights_stay_as_they_are(tiny_folder: TinyFolder, kind: str) -> None:
    model = loaded(tiny_folder, kind)
    inner = model._loaded.model
    before = {name: parameter.clone() for name, parameter in inner.named_parameters()}
    tenants = four_tenants(model.sites, "float32")
    install_all(model, tenants)
    run_segments(model, [member.segment() for member in tenants])
    for name, parameter in inner.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert not parameter.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_forward_only_gives_the_training_loss_and_no_taps(tiny_folder: TinyFolder, kind: str) -> None:
    model = loaded(tiny_folder, kind)
    tenants = four_tenants(model.sites, "float32")
    install_all(model, tenants)
    segments = [member.segment() for member in tenants]
    trained, _ = run_segments(model, segments)
    evaluated, taps = run_segments(model, segments, train=False)
    assert taps == []
    assert evaluated.losses == trained.losses


@pytest.mark.parametrize("kind", KINDS)
def test_a_failing_sink_leaves_the_model_usable(tiny_folder: TinyFolder, kind: str) -> None:
    model = loaded(tiny_folder, kind)
    tenants = four_tenants(model.sites, "float32")
    install_all(model, tenants)
    step = BaseStep(number=1, segments=(tenants[0].segment(),))
    expected = model.run(step, lambda _tap: None)

    def broken(_tap: Tap) -> None:
        raise OSError("the device has gone")

    with pytest.raises(OSError, match="gone"):
        model.run(step, broken)
    assert model.run(step, lambda _tap: None).losses == expected.losses
