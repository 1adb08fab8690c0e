"""Answers to held-out prompts are their tenant's to pay; without its adapter a base model ends the lease."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from cola_runtime.config import SchedulerSettings
from cola_runtime.data.held_out import HeldOutPrompts
from cola_runtime.encodings import Encoding, TapPlan
from cola_runtime.errors import NotFound
from cola_runtime.scheduler.leases import LeaseBook, LeaseLost
from cola_runtime.scheduler.loop import SchedulerLoop
from cola_runtime.scheduler.primitives import AdapterPrimitives, LeasedAdapter
from cola_runtime.scheduler.replicas import Replica
from cola_runtime.types import Lease

LEASE = Lease(job_id="job-1", epoch=1, device_id="d0")
PROMPTS = ((1,), (2, 2), (3, 3, 3, 3, 3))


@dataclass
class Base:
    """Answers a prompt with its length; `gone` after so many calls."""

    gone: int = 99
    calls: list[Sequence[Sequence[int]]] = field(default_factory=list)

    async def generate(
        self, job_id: str, prompts: Sequence[Sequence[int]], **options: Any
    ) -> list[list[int]]:
        assert (job_id, options["checkpoint"], options["temperature"]) == (LEASE.job_id, None, 0.0)
        if len(self.calls) >= self.gone:
            raise NotFound("ADAPTER_UNKNOWN", "no adapter is resident")
        await asyncio.sleep(0)
        self.calls.append(prompts)
        return [[len(prompt)] for prompt in prompts]


def replica_of(base: Base) -> Replica:
    settings = SchedulerSettings(token_budget=16)
    loop = SchedulerLoop(base, settings, on_base_lost=lambda error: None)  # type: ignore[arg-type]
    return Replica(name="tiny/0", base=base, loop=loop, description=None)  # type: ignore[arg-type]


def primitives() -> tuple[AdapterPrimitives, LeaseBook]:
    book = LeaseBook()
    book.open(LEASE, replica="tiny/0")
    others: dict[str, Any] = dict.fromkeys(("replicas", "pool", "store", "checkpoints", "checks"))
    return AdapterPrimitives(book=book, **others), book


def asked() -> HeldOutPrompts:
    return HeldOutPrompts(
        prompts=PROMPTS, references=("",) * 3, max_new_tokens=4, stop_ids=(), decode=lambda ids: ""
    )


def adapter(replica: Replica) -> LeasedAdapter:
    taps = TapPlan(Encoding.ADAPTER_GRADIENT)
    return LeasedAdapter(lease=LEASE, replica=replica, tenant_id="t", plan=None, taps=taps, version=0)  # type: ignore[arg-type]


async def test_prompts_go_in_parts_whose_tokens_are_the_tenants() -> None:
    base = Base()
    answering, _ = primitives()
    replica = replica_of(base)
    assert await answering.answer(adapter(replica), asked()) == [[1], [2], [5]]
    assert base.calls == [PROMPTS[:2], PROMPTS[2:]]
    assert replica.loop._queue.counter("t") == 2 * (2 + 4) + 1 * (5 + 4)


async def test_an_adapter_that_is_gone_loses_the_lease_not_the_job() -> None:
    answering, _ = primitives()
    with pytest.raises(LeaseLost) as caught:
        await answering.answer(adapter(replica_of(Base(gone=1))), asked())
    assert caught.value.reason == "ADAPTER_UNKNOWN"


async def test_a_lost_lease_ends_the_wait_for_answers() -> None:
    base = Base()
    answering, book = primitives()
    waiting = asyncio.create_task(answering.answer(adapter(replica_of(base)), asked()))
    await asyncio.sleep(0)
    book.lose(LEASE, reason="DEVICE_LINK_LOST", message="gone")
    with pytest.raises(LeaseLost):
        await waiting
    assert len(base.calls) < 2
