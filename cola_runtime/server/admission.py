"""Everything that is checked of a job before any of it exists."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from cola_runtime.adapters.shapes import weight_shapes
from cola_runtime.data.cursor import total_steps
from cola_runtime.data.formats import Dataset, parse_dataset
from cola_runtime.data.held_out import held_out_prompts
from cola_runtime.data.metrics import metrics_of
from cola_runtime.data.report import DatasetReport, dataset_report
from cola_runtime.data.tokenize import TokenizedDataset, Tokenizer, longest_row
from cola_runtime.encodings import TapPlan
from cola_runtime.errors import InvalidInput
from cola_runtime.jobs.bank_size import limited_bytes
from cola_runtime.jobs.plan import DataSize, TrainingPlan, job_taps, training_plan
from cola_runtime.rows import Row
from cola_runtime.server.base_models import BaseModels
from cola_runtime.spec import JobSpec
from cola_runtime.spec_parsing import parse_job_spec
from cola_runtime.types import BaseModelDescription


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What a tenant sent, as it came."""

    spec_json: str
    training: bytes
    training_name: str = "training"  # the tenant's file name, for messages about lines
    evaluation: bytes | None = None
    evaluation_name: str = ""
    idempotency_key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedJob:
    """A submission that can be trained."""

    spec: JobSpec
    report: DatasetReport
    taps: TapPlan
    taps_reason: str
    plan: TrainingPlan
    rows: tuple[Row, ...]
    held_out: tuple[Row, ...] = ()


class Admission:
    """Checks submissions against the base models that are served."""

    def __init__(self, base_models: BaseModels) -> None:
        self._base_models = base_models

    async def check(self, submission: Submission) -> CheckedJob:
        """Raises InvalidInput for what is wrong with the spec or any line of the data; creates nothing."""
        spec = parse_job_spec(_fields(submission.spec_json))
        base = self._base_models.find(spec.base_model)
        most_tokens = longest_row(spec, context_length=base.context_length)
        plan = training_plan(spec, base, total_steps=spec.steps or 1)
        await asyncio.to_thread(weight_shapes, plan.adapter)  # registered modules can be made for its sites
        _check_bank(plan, base)
        _check_evaluation(spec, held_out=submission.evaluation is not None)
        tokenizer = await self._base_models.tokenizer(spec.base_model)
        limits = _Limits(most_tokens, base.context_length)
        report, rows, held_out = await asyncio.to_thread(_check_data, submission, spec, tokenizer, limits)
        taps, reason = job_taps(
            spec, base, plan.adapter, DataSize.of(rows), self._base_models.costs(base.name)
        )
        return CheckedJob(
            spec=spec,
            report=report,
            taps=taps,
            taps_reason=reason,
            plan=plan,
            rows=rows,
            held_out=held_out,
        )


def _check_bank(plan: TrainingPlan, base: BaseModelDescription) -> None:
    needed = limited_bytes(plan, base)
    if base.bank_bytes is not None and needed > base.bank_bytes:
        raise InvalidInput(
            "BANK_TOO_SMALL",
            f"the adapter takes {needed:,} bytes beside base model {base.name}",
            where="job.adapter",
            limit=base.bank_bytes,
            actual=needed,
            remedy="Use a smaller rank, fewer target modules or mode merged; nothing was created.",
        )


def _check_evaluation(spec: JobSpec, *, held_out: bool) -> None:
    wanted, known = spec.evaluation, metrics_of(spec.task)
    if wanted.metric not in known:
        raise InvalidInput(
            "METRIC_UNSUPPORTED",
            f"a {spec.task.kind} job has no metric {wanted.metric}",
            where="job.evaluation.metric",
            remedy=f"Use one of {', '.join(sorted(known))}; nothing was created.",
        )
    if not held_out and (wanted.every is not None or wanted.patience is not None or wanted.new_tokens):
        raise InvalidInput(
            "EVALUATION_NEEDS_DATA",
            "the job asks for evaluations and has no held-out rows",
            where="job.evaluation",
            remedy="Give held-out rows (`evaluation`), or leave out `every`, `patience` and metric rouge_l.",
        )
    if wanted.patience is not None and wanted.every is None:
        raise InvalidInput(
            "SPEC_INVALID",
            "patience counts evaluations between the first and the last step, and `every` asks for none",
            where="job.evaluation.patience",
            remedy="Give `every` as well; nothing was created.",
        )


class _Limits(NamedTuple):
    longest_row: int
    context_length: int


def _check_data(
    submission: Submission, spec: JobSpec, tokenizer: Tokenizer, limits: _Limits
) -> tuple[DatasetReport, tuple[Row, ...], tuple[Row, ...]]:
    def rows(content: bytes, name: str) -> tuple[Dataset, TokenizedDataset]:
        dataset = parse_dataset(content, file_name=name)
        return dataset, tokenizer.tokenize(
            dataset, max_length=limits.longest_row, loss=spec.loss, truncate=spec.truncate, task=spec.task
        )

    dataset, tokenized = rows(submission.training, submission.training_name)
    held_out: tuple[Dataset, TokenizedDataset] | None = None
    if submission.evaluation is not None:
        held_out = rows(submission.evaluation, submission.evaluation_name or "evaluation")
        if spec.evaluation.new_tokens:
            held_out_prompts(
                *held_out,
                tokenizer,
                context_length=limits.context_length,
                new_tokens=spec.evaluation.new_tokens,
            )
    report = dataset_report(dataset, tokenized, steps=total_steps(len(tokenized.rows), spec))
    return report, tokenized.rows, () if held_out is None else held_out[1].rows


def _fields(spec_json: str) -> dict[str, Any]:
    try:
        fields = json.loads(spec_json)
    except (ValueError, RecursionError) as error:
        raise InvalidInput("SPEC_INVALID", "the job spec is not JSON", where="job") from error
    if not isinstance(fields, dict):
        raise InvalidInput("SPEC_INVALID", "the job spec is not an object", where="job")
    return fields
