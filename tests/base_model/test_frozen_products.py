"""Frozen weights that are kept in the processor's layout give the numbers of the plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cola_runtime.base_model import llama
from cola_runtime.base_model.frozen_products import FrozenProduct, PlainProduct, TiledProduct, tiles_pay
from cola_runtime.base_model.model import TappedModel
from cola_runtime.base_model.workspace import Workspace
from tests.base_model.conftest import TinyFolder
from tests.base_model.mixed_samples import four_tenants, gradients_of, install_all, run_segments

N, I, O = 24, 96, 160  # noqa: E741 (the shape suffixes of the project)
DTYPE = torch.bfloat16
pytestmark = pytest.mark.skipif(
    "mkldnn::_reorder_linear_weight" not in torch._C._dispatch_get_all_op_names()
    or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this processor has no bfloat16 products",
)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


def answers(product: FrozenProduct) -> list[Tensor]:
    space, x_NI, base_NO, grad_NO = Workspace(), drawn(N, I, seed=1), drawn(N, O, seed=2), drawn(N, O, seed=3)
    projected = product.project(x_NI, space, "projected").clone()
    added = product.add_projected(base_NO, x_NI, space, "added").clone()
    gradient = product.gradient(grad_NO, space, "gradient").clone()
    return [projected, added, gradient, product.add_gradient(gradient.clone(), base_NO)]


@pytest.mark.parametrize("bias_O", [None, drawn(O, seed=4)], ids=["no bias", "bias"])
def test_tiles_give_the_plain_products_numbers(bias_O: Tensor | None) -> None:
    weight_OI = drawn(O, I, seed=0)
    plain, tiled = (kind(weight_OI, bias_O, [O]) for kind in (PlainProduct, TiledProduct))
    for found, expected in zip(answers(tiled), answers(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-5)  # a rounding of bfloat16


def test_only_bfloat16_is_tried() -> None:
    assert not tiles_pay(torch.ones(O, I))


def loaded(tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch, *, tiled: bool) -> TappedModel:
    monkeypatch.setattr(llama, "tiles_pay", lambda _weight: tiled)
    return TappedModel.load(tiny_folder("llama", "bfloat16"), dtype="bfloat16", attention="eager", threads=1)


def norms(model: TappedModel) -> list[float]:
    """Of every gradient of a mixed step."""
    tenants = four_tenants(model.sites, "float32")
    install_all(model, tenants)
    _, taps = run_segments(model, [member.segment() for member in tenants])
    found = [gradients_of(taps, position, member) for position, member in enumerate(tenants)]
    return [float(gradient.norm()) for gradients in found for gradient in gradients.values()]


def test_a_mixed_step_is_the_same_with_tiles(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_tiles, without = (norms(loaded(tiny_folder, monkeypatch, tiled=tiled)) for tiled in (True, False))
    assert with_tiles == pytest.approx(without, rel=0.05)
