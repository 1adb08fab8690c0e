"""The base process holds each adapter once, however it was mixed, and nothing of a tenant that has left."""

from __future__ import annotations

import pytest

from cola_runtime.adapter_spec import LinearKind, LoraKind
from cola_runtime.base_model.model import TappedModel
from cola_runtime.testing.counted_memory import living_bytes
from tests.base_model.conftest import TinyFolder
from tests.base_model.kind_samples import everywhere
from tests.base_model.mixed_samples import Tenant, run_segments


def counted_after(model: TappedModel, tenants: list[Tenant]) -> int:
    """After steps of one, two, three, ... of them; without the buffers that all steps share."""
    for count in range(1, len(tenants) + 1):
        run_segments(model, [member.segment() for member in tenants[:count]])
    model._pass.space.release()
    return living_bytes()


@pytest.mark.parametrize(
    ("model_kind", "kind"), [("llama", LoraKind(rank=4, alpha=6.0)), ("gpt2", LinearKind(bias=True))]
)
def test_a_resident_tenant_takes_its_weights_once(
    tiny_folder: TinyFolder, model_kind: str, kind: LoraKind | LinearKind
) -> None:
    model = TappedModel.load(tiny_folder(model_kind, "float32"), dtype="float32", attention="eager")
    tenants = [everywhere(number, kind, model.sites, "float32") for number in range(4)]
    for member in tenants[:1]:
        model.install(member.lease, member.spec, 0, member.weights)
    alone = counted_after(model, tenants[:1])
    for member in tenants[1:]:
        model.install(member.lease, member.spec, 0, member.weights)
    weights = sum(weight.nbytes for weight in tenants[0].weights.values())
    assert counted_after(model, tenants) - alone == 3 * weights
    assert model.bank_bytes.model_device == 4 * weights
    for member in tenants[1:]:
        model.evict(member.job_id)
    assert counted_after(model, tenants[:1]) == alone
