"""Whole trajectories: merged alone is unmerged alone, a collaboration is its definition in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from cola_runtime.adapter_spec import AdapterKind, LinearKind, LoraKind
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.adapters.checkpoint_format import TrainingDefinition
from cola_runtime.base_model.model import TappedModel
from cola_runtime.device.session import AdapterSession
from cola_runtime.encodings import Encoding, TapPlan
from cola_runtime.rows import Row
from cola_runtime.testing.peft_reference import relative_difference
from cola_runtime.types import BaseStep, LearningRateSchedule, OptimizerHyperparameters, Segment
from tests.base_model.conftest import TinyFolder
from tests.base_model.merged_samples import (
    MEAN,
    SUM,
    Collaborator,
    PlainAdapter,
    PlainMerged,
    alone,
    collaborator,
    shares_of,
    summed,
)
from tests.base_model.mixed_samples import Weights, random_row

ADAMW = OptimizerHyperparameters(kind="adamw", learning_rate=2e-3, weight_decay=0.01)
CONSTANT = LearningRateSchedule(kind="constant", warmup_steps=0, total_steps=1000)


class Trained:
    """One tenant: its session as on a device, and its rows step by step."""

    def __init__(self, member: Collaborator, encoding: Encoding) -> None:
        self.member = member
        self._encoding = encoding
        spec = member.tenant.spec
        self.session = AdapterSession.create(
            TrainingDefinition(spec=spec, optimizer=ADAMW, schedule=CONSTANT)
        )

    def rows(self, step: int) -> tuple[Row, ...]:
        seed = 1000 * self.member.tenant.spec.seed + step
        return tuple(random_row(length, seed=seed + 100 * length) for length in (13, 9))

    def install(self, model: TappedModel, *, merged: bool) -> None:
        tenant, session = self.member.tenant, self.session
        membership = self.member.membership if merged else None
        model.install(tenant.lease, tenant.spec, session.version, session.weights(), membership=membership)

    def segment(self, *, merged: bool) -> Segment:
        rows = self.rows(self.session.version)
        plain = replace(self.member.tenant, rows=rows).segment(self._encoding)
        gang = self.member.membership.gang if merged else None
        return replace(plain, version=self.session.version, taps=TapPlan(self._encoding), gang=gang)


def base_step(model: TappedModel, tenants: Sequence[Trained], *, merged: bool) -> None:
    """One mixed base step, and every tenant's optimizer step."""
    taps: list = []
    segments = tuple(tenant.segment(merged=merged) for tenant in tenants)
    result = model.run(BaseStep(number=1, segments=segments), taps.append)
    assert [loss.reason for loss in result.losses] == [None] * len(tenants)
    for tap in taps:
        session = tenants[tap.segment].session
        for key, tensor in tap.tensors.items():
            session.add(key, tensor, version=session.version)
    for tenant in tenants:
        tenant.session.apply(version=tenant.session.version)
        tenant.install(model, merged=merged)


@pytest.mark.parametrize("kind", [LoraKind(rank=4, alpha=8.0), LinearKind(bias=True)], ids=["lora", "linear"])
def test_fifty_steps_merged_alone_are_fifty_steps_unmerged_alone(
    tiny_folder: TinyFolder, kind: AdapterKind
) -> None:
    ends: list[Weights] = []
    for merged, encoding in ((False, Encoding.ADAPTER_GRADIENT), (True, Encoding.ACTIVATIONS)):
        model = TappedModel.load(tiny_folder("gpt2", "float64"), dtype="float64", attention="eager")
        tenant = Trained(alone(collaborator(1, kind, model.sites, SUM)), encoding)
        tenant.install(model, merged=merged)
        for _ in range(50):
            base_step(model, [tenant], merged=merged)
        ends.append(tenant.session.weights())
    moved = relative_difference(ends[1], initial_weights(tenant.member.tenant.spec))
    assert max(moved.values()) > 0.1, "the comparison would be of nothing"
    assert max(relative_difference(ends[1], ends[0]).values()) < 1e-8


# Which tenants have rows in a base step, and who is leased then: tenant 2 joins late, tenant 1 leaves early.
SCHEDULE = [(0,), (0, 1), (1,), (1, 0), (0, 1, 2), (2,), (2, 0), (1, 2), (0,), (0, 2), (2,), (0, 2)]
JOINS = {0: 0, 1: 0, 2: 4}
LEAVES = {0: 12, 1: 8, 2: 12}


def simulated(path, members: Sequence[Collaborator], rows_of: Sequence[Trained]) -> list[Weights]:
    """ColA's collaboration in plain torch: explicitly merged weights, autograd, torch.optim.AdamW."""
    plain = PlainMerged(path)
    adapters = [PlainAdapter(member.tenant.spec, initial_weights(member.tenant.spec)) for member in members]
    optimizers = [
        torch.optim.AdamW(list(adapter.named.values()), lr=2e-3, weight_decay=0.01) for adapter in adapters
    ]
    versions = [0] * len(members)
    for step, active in enumerate(SCHEDULE):
        present = [k for k in range(len(members)) if JOINS[k] <= step < LEAVES[k]]
        shares = shares_of([members[k] for k in present])
        for optimizer in optimizers:
            optimizer.zero_grad()
        for k in active:
            merged = summed([adapters[j] for j in present], shares, own=present.index(k))
            plain.loss(merged, rows_of[k].rows(versions[k])).backward()
        for k in active:
            optimizers[k].step()
            versions[k] += 1
    return [{key: p.detach() for key, p in adapter.named.items()} for adapter in adapters]


@pytest.mark.parametrize("gang", [MEAN, SUM], ids=["mean", "sum"])
def test_a_collaboration_of_three_is_the_algorithm_in_plain_torch(tiny_folder: TinyFolder, gang) -> None:
    path = tiny_folder("gpt2", "float64")
    model = TappedModel.load(path, dtype="float64", attention="eager")
    kinds = [LoraKind(rank=4, alpha=8.0), LinearKind(bias=True), LoraKind(rank=2, alpha=2.0)]
    members = [collaborator(k, kind, model.sites, gang) for k, kind in enumerate(kinds)]
    tenants = [Trained(member, encoding) for member, encoding in zip(members, Encoding, strict=True)]
    for step, active in enumerate(SCHEDULE):
        for k, tenant in enumerate(tenants):
            if JOINS[k] == step:
                tenant.install(model, merged=True)
            if LEAVES[k] == step:
                model.evict(tenant.member.tenant.job_id)
        base_step(model, [tenants[k] for k in active], merged=True)
    for tenant, expected in zip(tenants, simulated(path, members, tenants), strict=True):
        assert max(relative_difference(tenant.session.weights(), expected).values()) < 1e-8
