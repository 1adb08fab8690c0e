"""Places of a rectangle that are nobody's, by which a CUDA device's passes become of few structures.

On a CUDA device every pass that may be captured has them (tests/accelerator); here they are asked for.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cola_runtime.adapter_spec import AdapterKind, LoraKind, ModuleKind
from cola_runtime.base_model import mixed_pass
from cola_runtime.base_model.captured import common_ghosts, common_length
from cola_runtime.base_model.mixed_pass import MixedPass
from cola_runtime.base_model.model import TappedModel
from cola_runtime.encodings import Encoding
from cola_runtime.testing.peft_reference import relative_difference
from tests.base_model.conftest import TinyFolder
from tests.base_model.mixed_samples import Tenant, four_tenants, gradients_of, install_all, run_segments
from tests.base_model.test_heads import labelled


def computed(
    tiny_folder: TinyFolder, encoding: Encoding
) -> tuple[list[Tenant], list[dict[object, torch.Tensor]], list[float], int]:
    """The tenants, two with heads in the midst of the others, their gradients and losses, computed tokens."""
    model = TappedModel.load(tiny_folder("llama", "float64"), dtype="float64", attention="eager", threads=1)
    heads = [labelled(model, number, "float64") for number in (0, 1)]
    tenants = [*heads, *four_tenants(model.sites, "float64")]
    tenants = [
        Tenant(job_id=f"job-{n}", spec=t.spec, weights=t.weights, rows=t.rows) for n, t in enumerate(tenants)
    ]
    install_all(model, tenants)
    result, taps = run_segments(model, [tenant.segment(encoding) for tenant in tenants])
    assert {tap.segment for tap in taps} == set(range(len(tenants)))
    gradients = [gradients_of(taps, position, tenant) for position, tenant in enumerate(tenants)]
    return tenants, gradients, [loss.loss_sum for loss in result.losses], result.computed_tokens


@pytest.mark.parametrize("encoding", list(Encoding))
def test_ghosts_change_nobodys_gradient_and_hand_out_nothing(
    tiny_folder: TinyFolder, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MixedPass, "lays_flat", property(lambda _self: False))
    _, alone, losses, tokens = computed(tiny_folder, encoding)
    monkeypatch.setattr(mixed_pass, "no_ghosts", lambda members: 2 * len(members))
    tenants, beside, losses_beside, more_tokens = computed(tiny_folder, encoding)
    assert more_tokens == 3 * tokens
    assert losses_beside == pytest.approx(losses, rel=1e-12)
    for position in range(len(tenants)):
        assert max(relative_difference(beside[position], alone[position]).values()) < 1e-12


def filled_up(count: int, kind: AdapterKind, *, gang: str | None = None) -> int:
    spec = SimpleNamespace(parts=(SimpleNamespace(kind=kind),))
    member = SimpleNamespace(adapter=SimpleNamespace(spec=spec, gang=gang))
    return count + common_ghosts([member] * count)


def test_cohorts_and_rows_are_filled_up_to_few_sizes() -> None:
    lengths = {n: common_length(n) for n in range(1, 1025)}
    assert all(n <= length <= max(8, 1.25 * n + 8) for n, length in lengths.items())
    assert sorted({length for length in lengths.values() if length > 512}) == [640, 768, 896, 1024]
    counts = [filled_up(n, LoraKind()) for n in range(1, 17)]
    assert counts == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16, 16, 16, 16]


def test_what_is_never_captured_has_no_ghosts() -> None:
    assert filled_up(5, LoraKind(dropout=0.1)) == filled_up(5, ModuleKind(name="a")) == 5
    assert filled_up(5, LoraKind(), gang="group/one") == 5
