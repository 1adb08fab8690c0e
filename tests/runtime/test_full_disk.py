"""While no file may grow, a coordinator answers what it can answer without writing."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from cola_runtime.errors import Unavailable
from cola_runtime.jobs import tenancy
from cola_runtime.testing.exactness import four_tenants, service_for, tenant_client
from cola_runtime.testing.in_process import running_in_process
from cola_runtime.testing.tiny_models import save_tiny_model


@contextmanager
def full_disk() -> Iterator[None]:
    """For this process: the kernel refuses to write beyond the first bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_reads_are_answered_while_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(tenancy, "LAST_USED_RESOLUTION", timedelta(0))  # each call would note its key's use
    model = save_tiny_model("gpt2", tmp_path / "model")
    job = four_tenants("tiny", steps=3, encoding="auto")[0]
    settings = service_for(tmp_path / "service", model=model, name="tiny", dtype="float32")
    async with running_in_process(settings) as (service, _), await tenant_client(service, "alice") as client:
        handle = await client.submit(job.spec, training=job.training)
        await handle.wait(60)
        with full_disk():
            assert (await handle.refresh()).state == "succeeded"
            assert [step.step for step in await handle.metrics()] == [1, 2, 3]
            assert [event async for event in handle.events(follow=False)]
            assert (await client.describe()).tenant == "alice"
            with pytest.raises(Unavailable):
                await service.store.add_event(handle.job_id, "note", "does not fit")
        await service.store.add_event(handle.job_id, "note", "fits again")
