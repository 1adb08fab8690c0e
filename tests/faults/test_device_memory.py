"""A device whose process gets no more memory: its job waits for another device, and ends as it should."""

from __future__ import annotations

import resource
import time
from pathlib import Path

from cola_runtime.client.job_handle import AsyncJobHandle
from cola_runtime.spec import JobSpec
from cola_runtime.testing.exactness import MixedJob
from tests.faults.fleet_jobs import outcome_of
from tests.faults.judging import Accept, fault_job, train_faultless
from tests.faults.processes import Zygote, fleet, submit

SPARE_BYTES = 4 << 20  # for what is not the adapter, which takes 17 MiB


def wide_job() -> MixedJob:
    job = fault_job(steps=6)
    fields = job.spec.model_dump() | {"adapter": {"kind": "mlp", "hidden": 2048}}
    return MixedJob(spec=JobSpec.model_validate(fields), training=job.training)


async def test_a_device_without_memory_says_so_and_the_job_goes_to_another(
    zygote: Zygote, model: Path, tmp_path: Path, accept: Accept
) -> None:
    faultless = await train_faultless(model, tmp_path / "faultless", wide_job())
    async with fleet(zygote, tmp_path, model) as at:
        at.start_device("device-0")
        await at.start_coordinator()
        async with at.client() as client:
            leave_memory(at.devices["device-0"], SPARE_BYTES)
            fault = time.time()
            handle = await submit(client, wide_job())
            lost = await first_loss(handle)
            assert lost == "DEVICE_OUT_OF_MEMORY"
            assert "DEVICE_OUT_OF_MEMORY" in (await handle.refresh()).waiting_reason
            at.start_device("device-1")
            accept(await outcome_of(at, handle, faultless, of=("device", "no memory"), faults=[fault]))


def leave_memory(pid: int, spare_bytes: int) -> None:
    """The kernel gives the process's address space so much and nothing beyond."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + spare_bytes
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))


async def first_loss(handle: AsyncJobHandle) -> str:
    """The reason of the first lease that was lost."""
    async for event in handle.events():
        if event.kind == "lease.lost":
            return str(event.data["reason"])
    raise AssertionError("no lease was lost")
