"""Products of whole tiles: the rows that are asked for are those of the product without the others."""

from __future__ import annotations

import pytest
import torch

from cola_runtime.base_model.frozen_products import TiledProduct
from cola_runtime.base_model.model import TappedModel
from cola_runtime.base_model.whole_tiles import TILE_ROWS, near_length, whole_rows, whole_tiles
from cola_runtime.base_model.workspace import Workspace
from tests.base_model.conftest import TinyFolder
from tests.base_model.mixed_samples import install_all, run_segments, tenant

I, O = 64, 48  # noqa: E741 (the shape suffixes of the project)


def test_only_bfloat16_products_of_the_processor_are_rounded_up() -> None:
    assert whole_rows(17, torch.empty(1, dtype=torch.bfloat16)) == 2 * TILE_ROWS
    assert whole_rows(32, torch.empty(1, dtype=torch.bfloat16)) == 32
    assert whole_rows(17, torch.empty(1, dtype=torch.float32)) == 17
    assert whole_rows(17, torch.empty(1, dtype=torch.bfloat16, device="meta")) == 17


def test_only_lengths_that_products_are_compiled_for_are_rounded_up() -> None:
    host = torch.device("cpu")
    assert [near_length(torch.bfloat16, host)(length) for length in (1, 4, 41)] == [4, 4, 44]
    assert near_length(torch.float32, host)(41) == 41
    assert near_length(torch.bfloat16, torch.device("meta"))(41) == 41


@pytest.mark.parametrize(("dtype", "computed"), [("bfloat16", 12), ("float32", 9)])
def test_a_steps_cohorts_are_padded_to_near_lengths(
    tiny_folder: TinyFolder, dtype: str, computed: int
) -> None:
    model = TappedModel.load(tiny_folder("llama", dtype), dtype=dtype, attention="eager", threads=1)
    member = tenant(0, model.sites, rank=4, lengths=(9,), dtype="float32")
    install_all(model, [member])
    result, _ = run_segments(model, [member.segment()])
    assert (result.real_tokens, result.computed_tokens) == (9, computed)


def test_rows_without_memory_behind_them_stay_as_they_are() -> None:
    space, fresh_NI = Workspace(), torch.ones(17, I, dtype=torch.bfloat16)
    roomy_NI = space.tensor("x", (17, I), torch.bfloat16)
    assert [len(whole) for whole in whole_tiles(roomy_NI)] == [2 * TILE_ROWS]
    assert [len(whole) for whole in whole_tiles(roomy_NI, fresh_NI)] == [17, 17]
    column_NI = space.tensor("wide", (17, 2 * I), torch.bfloat16)[:, :I]
    assert [len(whole) for whole in whole_tiles(column_NI)] == [17]


def test_a_buffer_that_is_asked_for_again_keeps_its_room() -> None:
    space = Workspace()
    space.tensor("x", (31, I), torch.bfloat16)
    assert [len(whole) for whole in whole_tiles(space.tensor("x", (17, I), torch.bfloat16))] == [32]


@pytest.mark.skipif(
    "mkldnn::_reorder_linear_weight" not in torch._C._dispatch_get_all_op_names()
    or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this processor has no bfloat16 products",
)
@pytest.mark.parametrize("rows", [1, 17, 41])
def test_what_lies_behind_the_rows_reaches_none_of_them(rows: int) -> None:
    torch.manual_seed(0)
    weight_OI = torch.randn(O, I).bfloat16()
    product, space = TiledProduct(weight_OI, None, [O]), Workspace()
    drawn_NI, base_drawn_NO = torch.randn(rows, I).bfloat16(), torch.randn(rows, O).bfloat16()
    results = []
    for behind in (0.0, float("nan")):
        x_NI = space.tensor("x", (rows, I), torch.bfloat16)
        base_NO = space.tensor("base", (rows, O), torch.bfloat16)
        for buffer, drawn in ((x_NI, drawn_NI), (base_NO, base_drawn_NO)):
            whole_tiles(buffer)[0].fill_(behind)
            buffer.copy_(drawn)
        results.append((product.project(x_NI, space, "y"), product.add_projected(base_NO, x_NI, space, "z")))
    for clean, beside_nan in zip(*results, strict=True):
        assert clean.shape == (rows, O)
        assert torch.equal(clean, beside_nan)
    expected_NO = drawn_NI.double() @ weight_OI.double().t()
    torch.testing.assert_close(results[0][0].double(), expected_NO, rtol=1e-2, atol=1e-1)
    torch.testing.assert_close(
        results[0][1].double(), expected_NO + base_drawn_NO.double(), rtol=1e-2, atol=1e-1
    )
