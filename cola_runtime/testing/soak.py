"""A real service under random kills, with what must hold checked all the while (docs/faults.md).

A round strikes once, sometimes twice, then waits until every job that was active makes progress again, or
until the target of the slowest of its faults has passed; then until the next round is due.
"""

from __future__ import annotations

import asyncio
import enum
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cola_runtime.testing.chaos import Way
from cola_runtime.testing.soak_flat import Lives, thresholds
from cola_runtime.testing.soak_fleet import BASE_MODEL, COORDINATOR, HANG_SECONDS, Fleet, SoakFleet
from cola_runtime.testing.soak_jobs import SoakJob, soak_jobs, train_expected
from cola_runtime.testing.soak_tenants import Tenants
from cola_runtime.testing.tiny_models import save_tiny_model

ROUND_SECONDS = 20.0
SECOND_STRIKE = 0.15  # of the rounds have another one, up to 4 s behind the first
SAMPLE_SECONDS = 2.0
LAST_JOBS_SECONDS = 240.0


class Kill(enum.StrEnum):
    DEVICE = "device SIGKILL"
    DEVICE_HANG = "device SIGSTOP beyond its lease, SIGCONT"
    BASE_MODEL = "base model SIGKILL"
    COORDINATOR = "coordinator SIGKILL"
    CUT = "stream cut"


TARGET_SECONDS = {
    Kill.DEVICE: 30.0,
    Kill.DEVICE_HANG: 30.0,
    Kill.BASE_MODEL: 60.0,
    Kill.COORDINATOR: 60.0,
    Kill.CUT: 30.0,
}
BAG = (Kill.DEVICE, Kill.CUT, Kill.BASE_MODEL, Kill.DEVICE_HANG, Kill.COORDINATOR, Kill.DEVICE, Kill.CUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakPlan:
    """What is done, and for how long."""

    seed: int
    seconds: float  # of kills
    quiet_seconds: float = 0.0  # behind them, with jobs and without kills: memory shows itself there
    kills: tuple[Kill, ...] = ()  # exactly these, one a round; () draws them until the time is over
    tenants: int = 3
    devices: int = 3
    steps: int = 120
    round_seconds: float = ROUND_SECONDS


@dataclass(slots=True)
class Struck:
    """One round."""

    at: float
    kills: list[str]
    of: list[str]
    target_seconds: float
    jobs: int  # that were active
    recovery_seconds: float | None = None

    @property
    def line(self) -> str:
        took = "NOT RECOVERED" if self.recovery_seconds is None else f"{self.recovery_seconds:.1f} s"
        said = " + ".join(f"{kill} ({of})" for kill, of in zip(self.kills, self.of, strict=True))
        return f"{said}: {self.jobs} jobs, {took} of {self.target_seconds:g} s"


@dataclass(slots=True)
class Soak:
    """One run. `report` is its outcome; with violations it has failed."""

    plan: SoakPlan
    folder: Path
    fleet_of: Callable[[Path, Path, int], AbstractAsyncContextManager[Fleet]] = SoakFleet
    say: Any = print
    struck: list[Struck] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    lives: Lives = field(default_factory=Lives)

    async def run(self) -> dict[str, Any]:
        """Serve, strike, check; everything that was started has ended when this returns."""
        plan, model = self.plan, save_tiny_model("gpt2", self.folder / "model")
        jobs = soak_jobs(steps=plan.steps, seed=plan.seed)
        expected = await train_expected(model, self.folder / "alone", jobs)
        async with self.fleet_of(self.folder / "service", model, plan.devices) as fleet:
            tenants = Tenants(fleet, jobs, expected, plan.seed)
            await tenants.open([f"tenant-{index}" for index in range(plan.tenants)])
            try:
                await self._soak(fleet, tenants)
            finally:
                await tenants.close()
        self.violations += [*tenants.violations, *fleet.problems, *self.lives.violations()]
        return self.report(tenants, jobs)

    async def _soak(self, fleet: Fleet, tenants: Tenants) -> None:
        """Until the strikes and the last jobs are over. Whatever breaks meanwhile is raised."""
        driving = [asyncio.create_task(tenants.drive(name), name=name) for name in tenants.clients]
        background = [
            asyncio.create_task(tenants.watch(), name="watch"),
            asyncio.create_task(self._sample(fleet), name="samples"),
        ]
        striking = asyncio.create_task(self._strike_all(fleet, tenants, driving), name="strikes")
        tasks = [*driving, *background, striking]
        try:
            while not striking.done():
                left = [task for task in tasks if not task.done()]
                await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                broken = [task for task in tasks if task.done() and task.exception() is not None]
                if broken:
                    await broken[0]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _strike_all(
        self, fleet: Fleet, tenants: Tenants, driving: Sequence[asyncio.Task[None]]
    ) -> None:
        await self._first_progress(tenants)
        await self._strike_rounds(fleet, tenants)
        await asyncio.sleep(self.plan.quiet_seconds)
        tenants.driving = False
        await asyncio.wait(driving)
        await self._finish(tenants)

    async def _first_progress(self, tenants: Tenants) -> None:
        async with asyncio.timeout(LAST_JOBS_SECONDS):
            while not any(ledger.moments for ledger in tenants.ledgers.values()):  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    async def _strike_rounds(self, fleet: Fleet, tenants: Tenants) -> None:
        drawn = random.Random(f"{self.plan.seed} kills")  # noqa: S311 (repeatable, guards nothing)
        end, kills = time.monotonic() + self.plan.seconds, self._kills(drawn)
        for kill in kills:
            began = time.monotonic()
            if began >= end and not self.plan.kills:
                return
            second = not self.plan.kills and drawn.random() < SECOND_STRIKE
            await self._round(fleet, tenants, drawn, [kill, *([next(kills)] if second else [])])
            await asyncio.sleep(max(0.0, began + self.plan.round_seconds - time.monotonic()))

    def _kills(self, drawn: random.Random) -> Iterator[Kill]:
        """Each kind is drawn before one comes too often."""
        if self.plan.kills:
            yield from self.plan.kills
            return
        while True:
            yield from drawn.sample(BAG, len(BAG))

    async def _round(
        self, fleet: Fleet, tenants: Tenants, drawn: random.Random, kills: Sequence[Kill]
    ) -> None:
        active = tenants.active()
        target = max(TARGET_SECONDS[kill] for kill in kills)
        struck = Struck(at=time.time(), kills=[], of=[], target_seconds=target, jobs=len(active))
        at = struck.at
        for number, kill in enumerate(kills):
            if number:
                await asyncio.sleep(drawn.uniform(0.0, 4.0))
            at, of = time.time(), await strike(fleet, kill, drawn)
            struck.kills.append(kill.value)
            struck.of.append(of or "was not running")
        struck.recovery_seconds = await self._recovered(tenants, active, at=at, target=target)
        self.struck.append(struck)
        self.say(f"[{time.strftime('%H:%M:%S', time.gmtime(struck.at))}] {struck.line}", flush=True)

    async def _recovered(
        self, tenants: Tenants, active: Sequence[Any], *, at: float, target: float
    ) -> float | None:
        """The longest of the active jobs' stalls; None, and a violation, beyond the target."""
        while True:
            waiting = [job for job in active if job.active and job.stall_since(at) is None]
            if not waiting:
                return max((job.stall_since(at) or 0.0 for job in active), default=0.0)
            if time.time() > at + target + 2 * SAMPLE_SECONDS:  # they are looked at now and then only
                stuck = ", ".join(f"{job.job_id} at step {job.version}" for job in waiting)
                self.violations.append(f"stuck for {target:g} s from {time.ctime(at)} on: {stuck}")
                return None
            await asyncio.sleep(0.1)

    async def _finish(self, tenants: Tenants) -> None:
        """Nothing is submitted any more; what there is ends."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_JOBS_SECONDS):
                while tenants.unfinished():
                    await tenants.resume_all()
                    await asyncio.sleep(1.0)
        left = [ledger.job_id for ledger in tenants.unfinished()]
        if left:
            self.violations.append(f"{LAST_JOBS_SECONDS:g} s after the end these have not ended: {left}")
        await tenants.check_usage()

    async def _sample(self, fleet: Fleet) -> None:
        while True:
            for role, pid in (await asyncio.to_thread(fleet.pids)).items():
                self.lives.sample("device" if role in fleet.device_names else role, pid, at=time.monotonic())
            await asyncio.sleep(SAMPLE_SECONDS)

    def report(self, tenants: Tenants, jobs: Sequence[SoakJob]) -> dict[str, Any]:
        return {
            "plan": {**asdict(self.plan), "jobs": [job.name for job in jobs]},
            "jobs": {name: value for name, value in asdict(tenants.found).items() if name != "violations"},
            "kills": {kill.value: of_kind(self.struck, kill) for kill in Kill},
            "rounds": [{**asdict(struck), "at": round(struck.at, 1)} for struck in self.struck],
            "processes": self.lives.judged(),
            "thresholds": {**thresholds(), "target_seconds": {k.value: v for k, v in TARGET_SECONDS.items()}},
            "violations": self.violations,
        }


async def strike(fleet: Fleet, kill: Kill, drawn: random.Random) -> str | None:
    """Do it once; what it was done to, or None if that did not run just now."""
    device = drawn.choice(fleet.device_names)
    link, way = drawn.choice((COORDINATOR, BASE_MODEL)), drawn.choice(list(Way))
    match kill:
        case Kill.DEVICE:
            return device if fleet.kill(device) else None
        case Kill.DEVICE_HANG:
            return f"{device}, {HANG_SECONDS:g} s" if await fleet.hang(device) else None
        case Kill.BASE_MODEL:
            return BASE_MODEL if fleet.kill(BASE_MODEL) else None
        case Kill.COORDINATOR:
            return COORDINATOR if fleet.kill(COORDINATOR) else None
        case Kill.CUT:
            return f"a device and the {link}, {way}" if await fleet.cut(link, way) else None


def of_kind(struck: Sequence[Struck], kill: Kill) -> dict[str, Any]:
    """Of the rounds that had this kill alone."""
    mine = [each for each in struck if each.kills == [kill.value]]
    took = [each.recovery_seconds for each in mine if each.recovery_seconds is not None]
    return {
        "struck": sum(each.kills.count(kill.value) for each in struck),
        "alone": len(mine),
        "median_seconds": round(statistics.median(took), 2) if took else None,
        "largest_seconds": round(max(took), 2) if took else None,
        "target_seconds": TARGET_SECONDS[kill],
    }
