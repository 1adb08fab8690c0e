"""A store on either database, with a clock that is moved by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from job_samples import HandClock

from cola_runtime.jobs.records import Tenant
from cola_runtime.jobs.store import JobStore


@pytest.fixture
def hand_clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def store(url: str, hand_clock: HandClock) -> AsyncIterator[JobStore]:
    store = await JobStore.open(url, now=hand_clock)
    yield store
    await store.close()


@pytest.fixture
async def tenant(store: JobStore) -> Tenant:
    return await store.create_tenant("acme")
