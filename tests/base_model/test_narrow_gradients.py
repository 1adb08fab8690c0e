"""Over a bfloat16 base model gradients travel in bfloat16 where nothing is lost: the same bits arrive."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cola_runtime.adapter_spec import AdapterKind, LinearizedLoraKind, LinearKind, LoraKind, MlpKind
from cola_runtime.base_model import segments
from cola_runtime.base_model.model import TappedModel
from cola_runtime.encodings import Encoding
from cola_runtime.gradients.planner import encodings_of
from cola_runtime.types import LossScaling, TensorKey
from tests.base_model.conftest import TinyFolder
from tests.base_model.kind_samples import everywhere
from tests.base_model.mixed_samples import Tenant, install_all, run_segments

KINDS: list[AdapterKind] = [
    LoraKind(rank=4, alpha=8.0),
    LoraKind(rank=4, alpha=8.0, dropout=0.25),
    LinearKind(bias=True, scaling=0.5),
    MlpKind(hidden=5, scaling=2.0),
    LinearizedLoraKind(rank=2, alpha=2.0),
    LinearizedLoraKind(rank=2, alpha=4.0, initial_b="zero"),
]
CASES = [
    (kind, encoding)
    for kind in KINDS
    for encoding in encodings_of(kind)
    if encoding is not Encoding.ACTIVATIONS
]
Sent = dict[int, dict[TensorKey, torch.Tensor]]


def sent(tapped: TappedModel, tenants: list[Tenant], encoding: Encoding, **fields: object) -> Sent:
    """By position, every tensor of its taps."""
    of_segments = [replace(member.segment(encoding), **fields) for member in tenants]
    result, taps = run_segments(tapped, of_segments)
    assert all(loss.reason is None for loss in result.losses)
    found: Sent = {position: {} for position in range(len(tenants))}
    for tap in taps:
        found[tap.segment].update({key: tensor.clone() for key, tensor in tap.tensors.items()})
    return found


@pytest.fixture
def tapped(tiny_folder: TinyFolder) -> TappedModel:
    return TappedModel.load(tiny_folder("llama", "bfloat16"), dtype="bfloat16", attention="eager")


@pytest.mark.parametrize(("kind", "encoding"), CASES)
def test_what_a_device_widens_is_bit_for_bit_what_the_base_model_would_have_widened(
    tapped: TappedModel, kind: AdapterKind, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenants = [everywhere(number, kind, tapped.catalogue, "float32") for number in (1, 3)]
    install_all(tapped, tenants)
    narrow = sent(tapped, tenants, encoding)
    for name in ("own_gradient_dtype", "product_dtype"):
        monkeypatch.setattr(segments, name, lambda *_, adapter, **__: adapter)
    wide = sent(tapped, tenants, encoding)
    for position in range(len(tenants)):
        assert narrow[position].keys() == wide[position].keys() != set()
        for key, tensor in narrow[position].items():
            assert (tensor.dtype, wide[position][key].dtype) == (torch.bfloat16, torch.float32)
            assert torch.equal(tensor.float(), wide[position][key]), key
            assert tensor.any() or tensor.numel() < 8, key  # zeros would be equal whatever was computed


@pytest.mark.parametrize("encoding", [Encoding.ADAPTER_GRADIENT, Encoding.WEIGHT_GRADIENT])
def test_under_a_loss_scale_gradients_travel_in_the_adapters_dtype(
    tapped: TappedModel, encoding: Encoding
) -> None:
    """Whatever the scale is just now, 1 too: the plan counts on it."""
    tenants = [everywhere(1, LoraKind(rank=4, alpha=8.0), tapped.sites, "float32")]
    install_all(tapped, tenants)
    for scale in (1.0, 1024.0):
        scaling = LossScaling(scale=scale, dynamic=scale == 1.0)
        found = sent(tapped, tenants, encoding, loss_scaling=scaling)
        assert {tensor.dtype for tensor in found[0].values()} == {torch.float32}
