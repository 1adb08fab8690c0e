"""When held-out rows are evaluated, what counts as an improvement, and when a job has seen enough."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from cola_runtime.data.held_out import HeldOutPrompts
from cola_runtime.encodings import Encoding, TapPlan
from cola_runtime.job_choices import Metric
from cola_runtime.jobs.plan import TrainingPlan
from cola_runtime.jobs.records import EvaluationRecord
from cola_runtime.rows import Row
from cola_runtime.scheduler.evaluation import EarlyStop, Evaluations, improves
from cola_runtime.scheduler.job_data import JobData
from cola_runtime.scheduler.primitives import LeasedAdapter, Loss
from cola_runtime.spec import JobSpec
from cola_runtime.types import Lease

LEASE = Lease(job_id="job-1", epoch=1, device_id="d0")
ROW = Row(tokens=np.zeros(3, np.int32), weights=np.ones(3, np.float32))
TOTAL_STEPS = 6


@dataclass
class Recorded:
    """A store and primitives whose held-out losses are known beforehand, by version."""

    losses: dict[int, float]
    records: list[EvaluationRecord] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    answers: dict[int, str] = field(default_factory=dict)

    async def evaluations(self, job_id: str) -> list[EvaluationRecord]:
        return list(self.records)

    async def record_evaluation(self, record: EvaluationRecord) -> EvaluationRecord:
        self.records.append(record)
        return record

    async def forward(self, adapter: LeasedAdapter, rows: object) -> Loss:
        self.forwards.append(adapter.version)
        return Loss(loss_sum=2 * self.losses[adapter.version], weight_sum=2.0)

    async def answer(self, adapter: LeasedAdapter, asked: HeldOutPrompts) -> list[bytes]:
        return [self.answers[adapter.version].encode() for _ in asked.prompts]

    async def checkpoint(self, adapter: LeasedAdapter) -> None:
        self.checkpoints.append(adapter.version)


def evaluations(at: Recorded, *, held_out: bool = True, **settings: object) -> Evaluations:
    spec = JobSpec.model_validate({"name": "j", "base_model": "m", "evaluation": settings})
    data = JobData(spec=spec, training=(), evaluation=(ROW,) if held_out else ())
    return Evaluations(data, total_steps=TOTAL_STEPS, primitives=at, store=at)  # type: ignore[arg-type]


def adapter(version: int, plan: TrainingPlan | None = None) -> LeasedAdapter:
    taps = TapPlan(Encoding.ADAPTER_GRADIENT)
    return LeasedAdapter(lease=LEASE, replica=None, tenant_id="t", plan=plan, taps=taps, version=version)  # type: ignore[arg-type]


async def walk(at: Recorded, found: Evaluations, *, start: int = 0) -> EarlyStop | None:
    """What a driver does: evaluate where it is due, until the end or an early stop."""
    await found.resume(LEASE.job_id)
    for version in range(start, TOTAL_STEPS + 1):
        if found.due(version):
            await found.run(adapter(version))
        if found.early_stop is not None:
            break
    return found.early_stop


@pytest.mark.parametrize(
    ("settings", "held_out", "due"),
    [
        ({}, True, [0, 6]),
        ({"every": 2}, True, [0, 2, 4, 6]),
        ({"every": 4}, True, [0, 4, 6]),
        ({"every": 100}, True, [0, 6]),
        ({}, False, []),
    ],
)
def test_rows_are_evaluated_before_at_intervals_and_after(
    settings: dict[str, object], held_out: bool, due: list[int]
) -> None:
    found = evaluations(Recorded({}), held_out=held_out, **settings)
    assert [version for version in range(TOTAL_STEPS + 1) if found.due(version)] == due


@pytest.mark.parametrize(
    ("losses", "settings", "stopped", "best", "kept"),
    [
        ([5, 4, 3, 2, 1, 0.5, 0.2], {"patience": 1}, None, 6, [0, 1, 2, 3, 4, 5, 6]),
        ([5, 4, 4, 3, 3.5, 3.2, 1], {"patience": 2}, 5, 3, [0, 1, 3]),
        ([5, 5, 5, 5, 5, 5, 5], {"patience": 3}, 3, 0, [0]),
        ([5, 4.95, 4.9, 4.85, 1, 1, 1], {"patience": 3, "min_delta": 0.2}, 3, 0, [0]),
        ([5, 4.9, 4.8, 4.7, 4.6, 4.5, 4.4], {"patience": 3, "min_delta": 0.25}, None, 6, [0, 3, 6]),
        ([5, 4, 4, 4, 4, 4, 4], {"patience": 2, "keep_best": False}, 3, 1, []),
        ([5, 4, 6, 7, 8, 9, 9], {}, None, 1, [0, 1]),
        ([5, 4, 4, 4, 4, 4, 4], {"patience": 2, "metric": "perplexity"}, 3, 1, [0, 1]),
    ],
)
async def test_a_job_stops_after_as_many_evaluations_without_improvement(
    losses: list[float], settings: dict[str, object], stopped: int | None, best: int, kept: list[int]
) -> None:
    at = Recorded(dict(enumerate(losses)))
    stop = await walk(at, evaluations(at, every=1, **settings))
    assert (None if stop is None else stop.step) == stopped
    assert [each.step for each in at.records if each.improved][-1] == best
    assert at.checkpoints == kept
    if stop is not None:
        assert (stop.best.step, stop.data["best_value"]) == (best, at.records[best].value)
        assert f"at step {best}" in stop.message


@pytest.mark.parametrize("again_from", [2, 3])
async def test_a_job_that_is_taken_up_again_stops_where_it_would_have(again_from: int) -> None:
    losses = dict(enumerate([5.0, 3, 4, 4, 4, 4, 4]))
    at = Recorded(losses)
    through = await walk(at, evaluations(at, every=1, patience=3))
    rewound = Recorded(losses, records=[each for each in at.records if each.step <= again_from])
    again = await walk(rewound, evaluations(rewound, every=1, patience=3), start=again_from)
    assert again == through
    assert rewound.records == at.records
    assert rewound.forwards == list(range(again_from + 1, 5)), "what is recorded is not computed again"


async def test_a_recorded_improvement_whose_checkpoint_is_missing_gets_it() -> None:
    at = Recorded({0: 5.0})
    found = evaluations(at)
    await found.run(adapter(0))
    assert at.checkpoints == [0]
    again = evaluations(at)
    await again.resume(LEASE.job_id)
    await again.run(adapter(0))
    assert (at.checkpoints, at.forwards) == ([0, 0], [0])


def test_an_improvement_is_strict() -> None:
    assert not improves(2.0, 2.0, metric=Metric.LOSS, min_delta=0.0)
    assert improves(1.9, 2.0, metric=Metric.LOSS, min_delta=0.0)
    assert not improves(1.5, 2.0, metric=Metric.LOSS, min_delta=0.5)


def written(metric: str) -> tuple[Recorded, Evaluations]:
    """One held-out prompt whose answer is, by version, further from and nearer to its reference."""
    answers = dict(enumerate(["x", "a x", "a b x", "a b", "a b c", "a b", "a b"]))
    at = Recorded(dict.fromkeys(range(TOTAL_STEPS + 1), 1.0), answers=answers)
    prompts = HeldOutPrompts(
        prompts=((5, 6),), references=("a b c d",), max_new_tokens=8, stop_ids=(), decode=bytes.decode
    )
    fields = {"every": 1, "metric": metric, "patience": 2}
    spec = JobSpec.model_validate({"name": "j", "base_model": "m", "evaluation": fields})
    data = JobData(
        spec=spec, training=(), evaluation=(ROW,), prompts=prompts if metric == "rouge_l" else None
    )
    return at, Evaluations(data, total_steps=TOTAL_STEPS, primitives=at, store=at)  # type: ignore[arg-type]


async def test_a_job_stops_and_keeps_its_best_by_what_it_writes() -> None:
    at, found = written("rouge_l")
    stop = await walk(at, found)
    assert [each.metrics["rouge_l"] for each in at.records] == pytest.approx(
        [0, 1 / 3, 4 / 7, 2 / 3, 6 / 7, 2 / 3, 2 / 3]
    )
    assert stop is not None and (stop.step, stop.best.step, stop.best.value) == (6, 4, pytest.approx(6 / 7))
    assert at.checkpoints == [0, 1, 2, 3, 4]


async def test_nothing_is_written_for_another_metric() -> None:
    at, found = written("loss")
    at.answers.clear()
    stop = await walk(at, found)
    assert stop is not None and stop.step == 2
    assert all("rouge_l" not in each.metrics for each in at.records)
