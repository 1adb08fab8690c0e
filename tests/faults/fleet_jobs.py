"""A job of a fleet of processes: until it is well under way, and to its end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from cola_runtime.client.asynchronous import AsyncClient
from cola_runtime.client.job_handle import AsyncJobHandle
from tests.faults.judging import Faultless, Outcome, fault_job, judge
from tests.faults.processes import Fleet, Zygote, finish, fleet, reach, submit

UNDER_WAY = 4  # steps: behind the first checkpoint


@asynccontextmanager
async def training(
    zygote: Zygote, folder: Path, model: Path
) -> AsyncIterator[tuple[Fleet, AsyncClient, AsyncJobHandle]]:
    """A coordinator, a device and the job that every case trains."""
    async with fleet(zygote, folder, model) as at:
        at.start_device("device-0")
        await at.start_coordinator()
        async with at.client() as client:
            handle = await submit(client, fault_job())
            await reach(handle, UNDER_WAY)
            yield at, client, handle


async def outcome_of(
    at: Fleet, handle: AsyncJobHandle, faultless: Faultless, *, of: tuple[str, str], faults: Sequence[float]
) -> Outcome:
    """What the (part, case) came to, once the job has ended; its coordinator may be another one by then."""
    part, case = of
    async with at.client() as client:
        ended = await finish(client, handle.job_id)
        return await judge(
            ended, faultless, part=part, case=case, faults=faults, data_dir=at.settings.data_dir
        )
