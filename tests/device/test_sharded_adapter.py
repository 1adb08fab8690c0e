"""Two real devices that hold a shard each, a real gradient server: torch's clipping, all or nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cola_runtime.adapter_spec import LeaseTerms
from cola_runtime.adapters.checkpoint_format import TrainingDefinition
from cola_runtime.adapters.joined_checkpoint import join_checkpoints
from cola_runtime.adapters.shards import shard_specs
from cola_runtime.base_model.updates import LeaseTable, Update
from cola_runtime.device.session import AdapterSession
from cola_runtime.errors import InvalidInput
from cola_runtime.types import Lease, StepRefused, TensorKey
from tests.device.adapter_samples import definition, gradients, kinds_spec
from tests.device.reference_training import train_alone
from tests.device.test_agent import JOBS, Fabric

LEASE = Lease(job_id=JOBS[0], epoch=1, device_id="d1", further_device_ids=("d2",))


@pytest.fixture
async def fabric() -> AsyncIterator[Fabric]:
    torch.set_num_threads(1)
    fabric = Fabric()
    await fabric.start()
    for device_id in LEASE.device_ids:
        await fabric.device(device_id)
    yield fabric
    await fabric.stop()


def of_shards(training: TrainingDefinition) -> list[TrainingDefinition]:
    return [replace(training, spec=spec) for spec in shard_specs(training.spec, 2)]


async def grant(
    fabric: Fabric, training: TrainingDefinition, *, lease: Lease = LEASE, max_staleness: int = 0
) -> Update:
    fabric.server.lease(lease, LeaseTerms(spec=training.spec, max_staleness=max_staleness))
    for part, of_shard in zip(lease.parts, of_shards(training), strict=True):
        how = {"every": 1, "shards": 2, "max_staleness": max_staleness}
        await fabric.coordinator.grant(part, of_shard, **how)
    return await fabric.update(lease, 0)


def taps(training: TrainingDefinition, version: int) -> list[dict[TensorKey, Tensor]]:
    return [gradients(training, 100 * version + part) for part in range(2)]


def assert_same(left: Mapping[TensorKey, Tensor], right: Mapping[TensorKey, Tensor]) -> None:
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert torch.equal(tensor, right[key]), key


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["adamw", "sgd", "adafactor"])
async def test_shards_step_as_torch_does_with_all_of_them(fabric: Fabric, kind: str, dtype: str) -> None:
    training = definition(kind=kind, spec=kinds_spec(dtype), max_grad_norm=0.3)
    start = await grant(fabric, training)
    assert_same(start.weights, AdapterSession.create(training).weights())
    alone = AdapterSession.create(training)
    for version in range(3):
        update = await fabric.step(LEASE, version, training)
        for tensors in taps(training, version):
            for key, tensor in tensors.items():
                alone.add(key, tensor, version=version)
        norm = alone.apply(version=version).gradient_norm
        assert update.gradient_norm == norm > 0.3
    assert_same(update.weights, train_alone(training, [taps(training, version) for version in range(3)]))


async def test_a_version_counts_when_every_shards_is_there(fabric: Fabric) -> None:
    training = definition(spec=kinds_spec())
    fabric.server.lease(LEASE, LeaseTerms(spec=training.spec))
    first, second = of_shards(training)
    await fabric.coordinator.grant(LEASE.parts[0], first, every=1, shards=2)
    await fabric.coordinator.send("d1", checkpoint_request={"lease": {"job_id": LEASE.job_id, "epoch": 1}})
    await fabric.coordinator.until(lambda: LEASE.job_id in fabric.coordinator.checkpoints)
    assert fabric.updates == [], "half an adapter"
    await fabric.coordinator.grant(LEASE.parts[1], second, shards=2)
    assert (await fabric.update(LEASE, 0)).weights.keys() == AdapterSession.create(training).weights().keys()


async def test_a_gradient_that_is_not_finite_in_one_shard_stops_all_of_them(fabric: Fabric) -> None:
    training = definition(spec=kinds_spec())
    await grant(fabric, training)
    tensors = gradients(training, 1)
    poisoned = next(iter(AdapterSession.create(of_shards(training)[1]).weights())).gradient
    tensors[poisoned] = torch.full_like(tensors[poisoned], float("nan"))
    await fabric.send(LEASE, 0, tensors)

    def refusals() -> set[str]:
        return {
            event.lease.device_id
            for event in fabric.events
            if isinstance(event, StepRefused) and event.reason == "NON_FINITE_GRADIENT"
        }

    await fabric.until(lambda: refusals() == set(LEASE.device_ids))
    assert {update.version for update in fabric.updates} == {0}


def test_a_lease_is_that_of_each_of_its_devices_and_of_no_other_epoch() -> None:
    table = LeaseTable()
    newer = replace(LEASE, epoch=2)
    table.open(newer, LeaseTerms(spec=kinds_spec()))
    assert all(table.find(part) is not None for part in (newer, *newer.parts))
    assert all(table.find(part) is None for part in (LEASE, *LEASE.parts))
    assert table.of(LEASE.job_id, epoch=2, device_id="d3") is None


async def test_a_shard_of_an_older_lease_takes_no_part(fabric: Fabric) -> None:
    training = definition(spec=kinds_spec())
    await grant(fabric, training)
    newer = replace(LEASE, epoch=2)
    fabric.server.lease(newer, LeaseTerms(spec=training.spec))
    await fabric.coordinator.grant(newer.parts[1], of_shards(training)[1], shards=2)
    await fabric.send(LEASE, 0, gradients(training, 1))
    await fabric.coordinator.grant(newer.parts[0], of_shards(training)[0], shards=2)
    await fabric.update(newer, 0)
    update = await fabric.step(newer, 0, training)
    assert_same(update.weights, train_alone(training, [taps(training, 0)]))
    assert {(each.lease.epoch, each.version) for each in fabric.updates} == {(1, 0), (2, 0), (2, 1)}


async def test_the_step_ahead_stays_aside_until_the_shards_have_agreed(fabric: Fabric) -> None:
    training = definition(spec=kinds_spec(), max_grad_norm=0.3)
    await grant(fabric, training, max_staleness=1)
    await fabric.send(LEASE, 0, gradients(training, 0))
    await fabric.send(LEASE, 0, gradients(training, 1), staleness=1)
    update = await fabric.update(LEASE, 2)
    assert_same(update.weights, train_alone(training, [[gradients(training, n)] for n in range(2)]))


async def test_the_checkpoints_of_the_shards_are_the_one_of_the_adapter(fabric: Fabric) -> None:
    training = definition(spec=kinds_spec())
    sessions = [AdapterSession.create(each) for each in (training, *of_shards(training))]
    tensors = gradients(training, 1)
    for session in sessions:
        for key in session.weights():
            session.add(key.gradient, tensors[key.gradient], version=0)
    norm = sessions[0].apply(version=0).gradient_norm
    for session in sessions[1:]:
        session.apply(version=0, norm=norm)
    whole, *parts = [session.checkpoint() for session in sessions]
    assert join_checkpoints(training.spec, parts) == whole
    for wrong in (
        [parts[0]],
        parts[::-1],
        [parts[0], AdapterSession.create(of_shards(training)[1]).checkpoint()],
    ):
        with pytest.raises(InvalidInput, match="do not belong together"):
            join_checkpoints(training.spec, wrong)
