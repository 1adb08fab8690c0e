"""What a job would take, told before it exists: the checks of a submission, and its own arithmetic.

Steps, tokens and (but for encoding `activations`, where it is a bound) bytes are those that will be counted;
seconds are a forecast from what the base model has computed so far and who else is there now.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from cola_runtime.adapters.shapes import weight_shapes
from cola_runtime.data.cursor import walked_steps
from cola_runtime.encodings import Encoding
from cola_runtime.gradients.planner import ITEM_BYTES, Costs
from cola_runtime.gradients.wire_size import tap_bytes
from cola_runtime.jobs.bank_size import bank_bytes
from cola_runtime.jobs.plan import DataSize, TrainingPlan, job_workload
from cola_runtime.jobs.records import TenantLoad, TenantTerms
from cola_runtime.scheduler.packing import split_rows
from cola_runtime.server.admission import CheckedJob
from cola_runtime.spec import EvaluationSpec
from cola_runtime.transport.wire_size import (
    microbatch_end_bytes,
    taps_wire_bytes,
    update_end_bytes,
    weights_wire_bytes,
)
from cola_runtime.types import BaseModelDescription

MOST_WALKED_STEPS = 20_000  # of a longer job these are counted, and the others taken to be alike
FLOPS_PER_PARAMETER = 4.0  # of a token: forward, and backward to the activations of a frozen base model
FORWARD_SHARE = 0.5  # of a training token's time that a held-out token takes
_VERSIONS = (0, 1, 1 << 7, 1 << 14)  # from each of these on a version takes one byte more in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """How the service stands when it is asked."""

    costs: Costs
    terms: TenantTerms  # of who asks
    loads: Sequence[TenantLoad]  # of the tenants with active jobs of the same base model
    tenant_id: str
    seconds_per_token: float | None  # of base steps so far, padding included; None: there were none
    device_id: str  # of some device: names are part of what travels
    replicas: int = 1  # of the base model


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEstimate:
    """What a job would take."""

    steps: int
    tokens: int  # trained on
    label_tokens: int
    evaluation_tokens: int
    encoding: str
    bytes_up: int
    bytes_down: int
    bank_bytes: int  # beside the base model, while it trains
    base_seconds: float
    seconds: float  # from now to its end
    share: float  # of one replica of the base model, as long as those stay who are there now
    meets_deadline: bool | None  # None: the job has none
    assumptions: tuple[str, ...]


@dataclass(slots=True)
class _Counted:
    """Of all steps of a job."""

    tokens: float = 0
    label_tokens: float = 0
    parts: float = 0  # microbatches, as the token budget cuts them
    ends_bytes: float = 0  # of the messages that end them

    def scaled(self, factor: float) -> _Counted:
        return _Counted(
            *(factor * value for value in (self.tokens, self.label_tokens, self.parts, self.ends_bytes))
        )


def estimate_job(checked: CheckedJob, base: BaseModelDescription, situation: Situation) -> JobEstimate:
    """Pure; takes a second at most."""
    steps = checked.report.steps
    walked = min(steps, MOST_WALKED_STEPS)
    workload = job_workload(checked.spec, base, DataSize.of(checked.rows), situation.costs)
    taps = tap_bytes(checked.plan.adapter, checked.taps, workload)
    counted = _count(checked, base, sum(map(len, taps)), walked, situation).scaled(steps / walked)
    evaluation_tokens = sum(row.length for row in checked.held_out) * _evaluations(
        checked.spec.evaluation, steps, held_out=bool(checked.held_out)
    )
    bytes_up = round(counted.parts * taps_wire_bytes(taps) + counted.ends_bytes)
    bytes_down = _bytes_down(checked.plan, steps, situation.device_id)
    per_token = situation.seconds_per_token or _from_flops(base, situation.costs)
    base_seconds = per_token * (counted.tokens + FORWARD_SHARE * evaluation_tokens)
    wire_seconds = (bytes_up + bytes_down) / situation.costs.link_bytes_per_second
    share = _share(situation)
    seconds = max(base_seconds + wire_seconds, base_seconds / share, _capped_seconds(counted, situation))
    deadline = checked.spec.deadline
    return JobEstimate(
        steps=steps,
        tokens=round(counted.tokens),
        label_tokens=round(counted.label_tokens),
        evaluation_tokens=evaluation_tokens,
        encoding=str(checked.taps),
        bytes_up=bytes_up,
        bytes_down=bytes_down,
        bank_bytes=bank_bytes(checked.plan, base),
        base_seconds=base_seconds,
        seconds=seconds,
        share=share,
        meets_deadline=None if deadline is None else seconds <= deadline.seconds,
        assumptions=tuple(_assumptions(checked, situation, walked)),
    )


def _count(
    checked: CheckedJob, base: BaseModelDescription, tensors: int, walked: int, situation: Situation
) -> _Counted:
    counted, parts_at = _Counted(), Counter[tuple[int, int]]()
    budget = situation.costs.token_budget
    for version, microbatches in enumerate(walked_steps(checked.rows, checked.spec, walked)):
        rows = [row for microbatch in microbatches for row in microbatch]
        counted.tokens += sum(row.length for row in rows)
        counted.label_tokens += sum(row.label_tokens for row in rows)
        parts = sum(
            len(split_rows(microbatch, token_budget=budget, unpadded=base.unpadded))
            for microbatch in microbatches
        )
        counted.parts += parts
        parts_at[max(first for first in _VERSIONS if first <= version), parts] += 1
    shards, device_id = checked.plan.shards, situation.device_id
    counted.ends_bytes = sum(
        times * shards * _ends_bytes(tensors, version, parts, device_id)
        for (version, parts), times in parts_at.items()
    )
    return counted


def _ends_bytes(tensors: int, version: int, parts: int, device_id: str) -> int:
    """Of one step's MicrobatchEnd messages to one device."""
    return sum(
        microbatch_end_bytes(
            device_id, version=version, microbatch=number, tensors=tensors, apply=number == parts - 1
        )
        for number in range(parts)
    )


def _bytes_down(plan: TrainingPlan, steps: int, device_id: str) -> int:
    """Every step's new weights, and the message that ends them, from each shard's device."""
    total, item_bytes = 0, ITEM_BYTES[plan.adapter.dtype]
    for of_shard in plan.of_shards():
        sizes = [prod(shape) * item_bytes for shape in weight_shapes(of_shard.adapter).values()]
        total += steps * weights_wire_bytes(sizes)
        for first, behind in zip(_VERSIONS[1:], (*_VERSIONS[2:], steps + 1), strict=True):
            times = max(0, min(behind, steps + 1) - first)
            total += times * update_end_bytes(device_id, version=first)
    return total


def _evaluations(spec: EvaluationSpec, steps: int, *, held_out: bool) -> int:
    """Before the first step, every so many, after the last; as many as there are without an early stop."""
    if not held_out:
        return 0
    return 2 + ((steps - 1) // spec.every if spec.every is not None else 0)


def _from_flops(base: BaseModelDescription, costs: Costs) -> float:
    return FLOPS_PER_PARAMETER * base.parameters / costs.base_flops


def _share(situation: Situation) -> float:
    """The tenant's, by weight among those with active jobs; of that one part, with its own active jobs.

    Of all replicas, and at most one of them: a job's rows are computed by one.
    """
    others = sum(load.weight for load in situation.loads if load.tenant_id != situation.tenant_id)
    own_jobs = sum(load.jobs for load in situation.loads if load.tenant_id == situation.tenant_id)
    of_all = situation.terms.weight / (situation.terms.weight + others) / (1 + own_jobs)
    return min(1.0, max(1, situation.replicas) * of_all)


def _capped_seconds(counted: _Counted, situation: Situation) -> float:
    cap = situation.terms.tokens_per_minute
    return 0.0 if cap is None else 60.0 * counted.tokens / cap


def _assumptions(checked: CheckedJob, situation: Situation, walked: int) -> Iterator[str]:
    if situation.seconds_per_token is None:
        yield "no base step was computed yet: its time is from the base model's matrix products"
    else:
        yield f"a token takes {1e3 * situation.seconds_per_token:.3g} ms, as those of the base steps so far"
    jobs = sum(load.jobs for load in situation.loads)
    yield f"the {jobs} active jobs of {len(situation.loads)} tenants go on meanwhile, and no others come"
    if situation.replicas > 1:
        yield f"the {situation.replicas} replicas of its base model are evenly loaded"
    yield "no device or service is lost, and no step is repeated"
    if situation.terms.concurrent_jobs is not None:
        yield f"it need not wait for its tenant's cap of {situation.terms.concurrent_jobs} concurrent jobs"
    if checked.spec.evaluation.patience is not None:
        yield "it does not stop early"
    if checked.spec.evaluation.new_tokens and checked.held_out:
        yield "the answers to held-out prompts are not counted"
    encodings = {checked.taps.encoding, *(encoding for _, encoding in checked.taps.exceptions)}
    if Encoding.ACTIVATIONS in encodings:
        yield "bytes up are a bound: tokens whose gradient is zero are not sent"
    if checked.plan.shards > 1:
        yield "the shards' messages about norms are not counted"
    if checked.report.steps > walked:
        yield f"the first {walked:,} steps were counted, the others are taken to be alike"
