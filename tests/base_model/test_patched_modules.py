"""Siblings that share an input take each other's results, and never a stale one."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from cola_runtime.adapter_spec import lora_spec
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.base_model.bank import AdapterBank
from cola_runtime.base_model.segments import Cohort, Member
from cola_runtime.base_model.site_groups import SiteGroup
from cola_runtime.base_model.stacks.cohorts import GroupPlaces, group_stacks
from cola_runtime.base_model.stacks.lora import LoraStack
from cola_runtime.base_model.stacks.protocol import Span
from cola_runtime.base_model.tapped import TappedModules
from cola_runtime.base_model.workspace import Workspace
from cola_runtime.types import Lease, Segment, Site, SiteKind
from tests.base_model.mixed_samples import random_row

SITES = tuple(
    Site(index=k, name=name, kind=SiteKind.LINEAR, in_features=6, out_features=4 + k, input_group=0)
    for k, name in enumerate(("q", "k"))
)


def two_siblings() -> tuple[list[nn.Linear], TappedModules, dict[int, list[LoraStack]]]:
    torch.manual_seed(0)
    modules = [nn.Linear(6, 4 + k).requires_grad_(False) for k in range(2)]
    group = SiteGroup(SITES, modules)
    group.fuse()
    tapped = TappedModules([group])
    bank = AdapterBank(SITES, torch.float32)
    lease = Lease(job_id="job-0", epoch=1, device_id="device")
    spec = lora_spec(rank=2, alpha=4.0, use_rslora=False, seed=0, sites=SITES)
    bank.install(lease, spec, 0, {key: torch.ones_like(w) for key, w in initial_weights(spec).items()})
    adapter = bank.adapter("job-0")
    assert adapter is not None
    segment = Segment(lease=lease, version=0, rows=(random_row(3, seed=0),), loss_denominator=1.0)
    cohort = Cohort(
        members=(Member(position=0, segment=segment, adapter=adapter),), span=Span(0, len(segment.rows))
    )
    places = GroupPlaces(positions={0: 0, 1: 1}, source_groups=frozenset())
    return modules, tapped, group_stacks([cohort], places, Workspace(), None)


def adapted(module: nn.Linear, x: Tensor) -> Tensor:
    """All factors are one: B A x is rank times the sum of x, s = 2."""
    return nn.functional.linear(x, module.weight, module.bias) + 2.0 * 2.0 * x.sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("training", [True, False])
def test_a_sibling_called_with_another_input_is_computed_anew(training: bool) -> None:
    modules, tapped, stacks = two_siblings()
    first, second = torch.randn(1, 3, 6), torch.randn(1, 3, 6)
    with tapped.active(stacks, rows=1, training=training):
        query, key = modules[0](first), modules[1](second)
        again = modules[1](second)
    torch.testing.assert_close(query, adapted(modules[0], first))
    torch.testing.assert_close(key, adapted(modules[1], second))
    torch.testing.assert_close(again, key)
    assert query.requires_grad is training


def test_after_the_step_the_modules_are_plain_and_hold_nothing() -> None:
    modules, tapped, stacks = two_siblings()
    x = torch.randn(1, 3, 6)
    with tapped.active(stacks, rows=1, training=False):
        modules[0](x)  # the sibling's output is never asked for
    plain = modules[1](x)
    torch.testing.assert_close(plain, nn.functional.linear(x, modules[1].weight, modules[1].bias))
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None
