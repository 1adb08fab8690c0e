"""A spot check that was to be made when the coordinator died is made by the next one."""

from __future__ import annotations

from pathlib import Path

import pytest

from cola_runtime.config import SpotCheckSettings
from tests.faults.judging import CHECKPOINT_EVERY, fault_job
from tests.faults.processes import Zygote, finish, fleet, submit

STEPS = 2 * CHECKPOINT_EVERY


@pytest.mark.quick
@pytest.mark.timeout(400)
async def test_checks_that_were_pending_at_a_crash_are_made_after_it(
    zygote: Zygote, model: Path, tmp_path: Path
) -> None:
    """It dies as the second checkpoint, and with it what is to be checked, has been committed."""
    marker = tmp_path / "died"
    async with fleet(zygote, tmp_path, model, devices=2) as at:
        at.settings = at.settings.model_copy(update={"spot_checks": SpotCheckSettings(trusted=1.0)})
        for device_id in ("device-0", "device-1"):
            at.start_device(device_id)
        await at.start_coordinator(crash=f"store.checkpoint.committed:2:{marker}")
        async with at.client() as client:
            handle = await submit(client, fault_job(steps=STEPS))
            await at.died(at.coordinator, marker)
            await at.start_coordinator()
            handle = await finish(client, handle.job_id)
            events = [event async for event in handle.events(follow=False)]
            checks = [event for event in events if event.kind.startswith("spot_check")]
            intervals = sorted((each.data["first"], each.data["last"]) for each in checks)
            firsts = range(0, STEPS, CHECKPOINT_EVERY)
            assert intervals == [(first, first + CHECKPOINT_EVERY) for first in firsts]
            assert all("all bits" in each.message for each in checks), checks
