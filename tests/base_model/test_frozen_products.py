"""Products by oneDNN, of weights as they are or in its layout, give the numbers of the plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cola_runtime.base_model import frozen_products, llama, loss
from cola_runtime.base_model.frozen_products import (
    FEW_ROWS,
    CompiledProduct,
    FrozenProduct,
    PlainProduct,
    ProductKind,
    TiledForFewRows,
    TiledProduct,
    fastest_product,
)
from cola_runtime.base_model.model import TappedModel
from cola_runtime.base_model.workspace import Workspace
from tests.base_model.conftest import TinyFolder
from tests.base_model.mixed_samples import four_tenants, gradients_of, install_all, run_segments

N, I, O = 24, 96, 160  # noqa: E741 (the shape suffixes of the project)
DTYPE = torch.bfloat16
has_bfloat16 = pytest.mark.skipif(
    "mkldnn::_reorder_linear_weight" not in torch._C._dispatch_get_all_op_names()
    or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this processor has no bfloat16 products",
)


def drawn(*shape: int, seed: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def answers(product: FrozenProduct, dtype: torch.dtype = DTYPE) -> list[Tensor]:
    space, x_NI = Workspace(), drawn(N, I, seed=1, dtype=dtype)
    base_NO, grad_NO = drawn(N, O, seed=2, dtype=dtype), drawn(N, O, seed=3, dtype=dtype)
    projected = product.project(x_NI, space, "projected").clone()
    added = product.add_projected(base_NO, x_NI, space, "added").clone()
    gradient = product.gradient(grad_NO, space, "gradient").clone()
    return [projected, added, gradient, product.add_gradient(gradient.clone(), base_NO)]


@has_bfloat16
@pytest.mark.parametrize("bias_O", [None, drawn(O, seed=4)], ids=["no bias", "bias"])
def test_tiles_give_the_plain_products_numbers(bias_O: Tensor | None) -> None:
    weight_OI = drawn(O, I, seed=0)
    plain, tiled = (kind(weight_OI, bias_O, [O]) for kind in (PlainProduct, TiledProduct))
    for found, expected in zip(answers(tiled), answers(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-5)  # a rounding of bfloat16


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_onednns_products_of_float32_are_the_plain_ones(with_bias: bool) -> None:
    weight_OI = drawn(O, I, seed=0, dtype=torch.float32)
    bias_O = drawn(O, seed=4, dtype=torch.float32) if with_bias else None
    plain, compiled = (kind(weight_OI, bias_O, [O]) for kind in (PlainProduct, CompiledProduct))
    for found, expected in zip(answers(compiled, torch.float32), answers(plain, torch.float32), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_onednns_products_see_a_weight_that_was_merged_into() -> None:
    weight_OI, x_NI = drawn(O, I, seed=0, dtype=torch.float32), drawn(N, I, seed=1, dtype=torch.float32)
    product, space = CompiledProduct(weight_OI, None, [O]), Workspace()
    before_NO = product.project(x_NI, space, "y").clone()
    weight_OI.mul_(2.0)
    torch.testing.assert_close(product.project(x_NI, space, "y"), 2.0 * before_NO)
    grad_NO = drawn(N, O, seed=3, dtype=torch.float32)
    torch.testing.assert_close(product.gradient(grad_NO, space, "g"), grad_NO @ weight_OI)


@has_bfloat16
def test_tiles_for_few_rows_are_read_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI = drawn(O, I, seed=0)
    product = TiledForFewRows(weight_OI, None, [O])
    few, plain = (kind(weight_OI, None, [O]) for kind in (TiledForFewRows, PlainProduct))
    for found, expected in zip(answers(few), answers(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-5)
    weight_OI.zero_()  # its tiles stay what they were
    space = Workspace()
    for rows, kept in ((FEW_ROWS, True), (FEW_ROWS + 1, False)):
        x_NI, grad_NO = drawn(rows, I, seed=1), drawn(rows, O, seed=2)
        results = (
            product.project(x_NI, space, "y"),
            product.add_projected(torch.zeros_like(grad_NO), x_NI, space, "sum"),
            product.gradient(grad_NO, space, "g"),
            product.add_gradient(torch.zeros_like(x_NI), grad_NO),
        )
        assert all(bool(result.any()) == kept for result in results)


@pytest.mark.parametrize(
    ("dtype", "keep_tiles", "few", "many", "expected"),
    [
        (torch.float64, True, 0.5, 0.5, PlainProduct),
        (torch.bfloat16, False, 0.5, 0.5, PlainProduct),
        (torch.bfloat16, True, 0.84, 0.84, TiledProduct),
        (torch.bfloat16, True, 0.89, 0.86, TiledForFewRows),
        (torch.bfloat16, True, 0.91, 0.86, PlainProduct),
        (torch.float32, False, 0.86, 0.84, CompiledProduct),
        (torch.float32, True, 0.84, 0.86, PlainProduct),
    ],
)
def test_another_product_is_taken_only_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch,
    *,
    dtype: torch.dtype,
    keep_tiles: bool,
    few: float,
    many: float,
    expected: ProductKind,
) -> None:
    def seconds(products: list[FrozenProduct], x_NI: Tensor, _space: Workspace) -> float:
        return 1.0 if type(products[0]) is PlainProduct else few if len(x_NI) <= FEW_ROWS else many

    monkeypatch.setattr(frozen_products, "_seconds", seconds)
    monkeypatch.setattr(frozen_products, "_is_faster", frozen_products._is_faster.__wrapped__)
    assert fastest_product(torch.ones(O, I, dtype=dtype), keep_tiles=keep_tiles) is expected


@pytest.mark.parametrize(("share", "expected"), [(0.5, TiledProduct), (1.0, PlainProduct)])
def test_a_neighbour_that_comes_and_goes_during_the_trial_does_not_decide_it(
    monkeypatch: pytest.MonkeyPatch, share: float, expected: ProductKind
) -> None:
    """Nor does what the first product compiles."""
    disturbed = {1: 90.0, 4: 30.0, 9: 0.1, 14: 0.1}  # some of the times asked for, whoever's

    def seconds(products: list[FrozenProduct], _x_NI: Tensor, _space: Workspace) -> float:
        asked.append(products)
        return disturbed.get(len(asked), 1.0 if type(products[0]) is PlainProduct else share)

    monkeypatch.setattr(frozen_products, "_seconds", seconds)
    monkeypatch.setattr(frozen_products, "_is_faster", frozen_products._is_faster.__wrapped__)
    for turned in range(4):
        asked: list[object] = [None] * turned
        assert fastest_product(torch.ones(O, I, dtype=torch.bfloat16), keep_tiles=True) is expected


def loaded(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch, kind: ProductKind, dtype: str
) -> TappedModel:
    """With such products in the layers and in the vocabulary's projection."""
    for module in (llama, loss):
        monkeypatch.setattr(module, "fastest_product", lambda _weight, keep_tiles: kind)
    return TappedModel.load(tiny_folder("llama", dtype), dtype=dtype, attention="eager", threads=1)


def norms(model: TappedModel) -> list[float]:
    """Of every gradient of a mixed step."""
    tenants = four_tenants(model.sites, "float32")
    install_all(model, tenants)
    _, taps = run_segments(model, [member.segment() for member in tenants])
    found = [gradients_of(taps, position, member) for position, member in enumerate(tenants)]
    return [float(gradient.norm()) for gradients in found for gradient in gradients.values()]


@has_bfloat16
def test_a_mixed_step_is_the_same_with_tiles(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_tiles, without = (
        norms(loaded(tiny_folder, monkeypatch, kind, "bfloat16")) for kind in (TiledProduct, PlainProduct)
    )
    assert with_tiles == pytest.approx(without, rel=0.05)


def test_a_mixed_step_in_float32_is_the_same_by_onednn(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, plain = (
        norms(loaded(tiny_folder, monkeypatch, kind, "float32")) for kind in (CompiledProduct, PlainProduct)
    )
    assert compiled == pytest.approx(plain, rel=1e-4)
