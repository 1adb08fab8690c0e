"""Each rule of a soak notices what breaks it, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cola_runtime.client.values import Event, Job, Step
from cola_runtime.testing.soak_flat import MIB, Lives, Sample, judge, slope
from cola_runtime.testing.soak_jobs import Expected, soak_jobs
from cola_runtime.testing.soak_ledger import JobLedger

FIXED = soak_jobs(steps=3, seed=0)[0]
NO_JOB = Job(**dict.fromkeys(Job.__dataclass_fields__, ""))  # type: ignore[arg-type]
NO_STEP = Step(**dict.fromkeys(Step.__dataclass_fields__, 0))  # type: ignore[arg-type]
LEASE = ("lease.granted", {"epoch": 1})
DONE = ("job.succeeded", {"from": "running", "to": "succeeded"})


def step(number: int, epoch: int = 1) -> tuple[str, dict[str, Any]]:
    return ("step.applied", {"step": number, "epoch": epoch})


def rewound(before: int, to: int, epoch: int) -> tuple[str, dict[str, Any]]:
    return ("job.rewound", {"from": before, "to": to, "epoch": epoch})


def ledger_of(*told: tuple[str, dict[str, Any]]) -> JobLedger:
    ledger = JobLedger("job-1", FIXED)
    for number, (kind, data) in enumerate(told, start=1):
        at = f"2026-01-01T00:00:{number:02d}Z"
        ledger.hear(
            Event(id=number, job_id="job-1", created_at=at, kind=kind, level="", message="", data=data)
        )
    return ledger


def test_a_job_that_loses_a_lease_and_makes_its_steps_again_breaks_no_rule() -> None:
    again = [("lease.granted", {"epoch": 2}), rewound(2, 1, 2), step(2, 2), step(3, 2)]
    ledger = ledger_of(LEASE, step(1), step(2), *again, DONE)
    steps = [replace(NO_STEP, step=n, epoch=e, tokens=5) for n, e in ((1, 1), (2, 2), (3, 2))]
    job = replace(NO_JOB, state="succeeded", version=3, tokens=15, repeated_steps=1)
    ledger.see(job)
    ledger.check_account(job, steps)
    ledger.check_completed(job, steps, Expected(losses=(0, 0, 0), tokens=15, checkpoint=b""))
    assert ledger.violations == []


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ([LEASE, step(2)], "step 2 was applied behind step 0"),
        ([LEASE, step(1), step(1)], "step 1 was applied behind step 1"),
        ([LEASE, step(1, epoch=2)], "under epoch 2"),
        ([LEASE, LEASE], "epoch 1 was granted behind epoch 1"),
        ([LEASE, step(1), rewound(2, 1, 1)], "rewound from 2"),
        ([LEASE, DONE, step(1)], "behind its end"),
        ([LEASE, DONE, ("job.running", {"from": "succeeded", "to": "running"})], "became running"),
    ],
)
def test_events_that_cannot_follow_each_other_are_noticed(
    told: list[tuple[str, dict[str, Any]]], says: str
) -> None:
    assert any(says in wrong for wrong in ledger_of(*told).violations)


def test_an_account_that_is_not_the_records_is_noticed() -> None:
    ledger = ledger_of(LEASE, step(1), step(2), DONE)
    steps = [replace(NO_STEP, step=1, epoch=1, tokens=5), replace(NO_STEP, step=3, epoch=1, tokens=5)]
    job = replace(NO_JOB, state="succeeded", version=2, tokens=11, repeated_steps=0)
    ledger.check_account(job, steps)
    ledger.check_completed(job, steps, Expected(losses=(0, 0, 0), tokens=15, checkpoint=b""))
    said = "\n".join(ledger.violations)
    for expected in ("steps are [1, 3]", "11 tokens", "2 of 3 steps", "11 tokens instead of 15", "losses"):
        assert expected in said


def test_an_end_that_is_taken_back_is_noticed() -> None:
    ledger = ledger_of(LEASE, DONE)
    ledger.see(replace(NO_JOB, state="running"))
    assert "it was succeeded and is said to be running" in ledger.violations[0]


def test_a_stall_is_over_when_progress_goes_on_and_not_with_what_was_under_way() -> None:
    ledger = ledger_of(LEASE)
    ledger.moments = [100.5]
    assert ledger.stall_since(100.0) is None
    ledger.moments += [109.0, 109.1]
    assert ledger.stall_since(100.0) == 8.5


def life(*, slope_mib: float = 0.0, files: int = 10, jump: bool = False) -> list[Sample]:
    return [
        Sample(
            at=float(second),
            memory_bytes=int(MIB * (200 + slope_mib * second / 60 + (50 if jump and second > 150 else 0))),
            files=10 if second < 180 else files,
            threads=5,
        )
        for second in range(0, 300, 2)
    ]


def test_growth_of_memory_or_files_is_noticed_and_one_jump_is_none() -> None:
    assert judge([life()])["flat"] is True
    assert judge([life(slope_mib=10)])["flat"] is False
    assert judge([life(files=100)])["flat"] is False
    assert judge([life(jump=True), life(), life()])["flat"] is True
    assert judge([life()[:20]])["flat"] is None
    assert slope([(0, 1), (1, 2), (2, 300), (3, 4)]) == pytest.approx(1.0, abs=1.0)


def test_a_process_that_is_gone_is_not_sampled() -> None:
    lives = Lives()
    lives.sample("device", 2**22 + 1, at=0.0)
    assert lives.judged() == {}
